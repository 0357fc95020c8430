//! What the fuzz targets in `fuzz/` do with any bytes, and what must hold then. `cargo test` replays their corpus.
//!
//! What comes in: bytes, as a kernel program gone wrong, a damaged file, a stranger's process name or a reply of the kernel
//! could have them. What goes out: nothing, or a panic that says what does not hold. Built for tests, and with the feature
//! `fuzzing`; no part of tracer uses it. It must touch nothing of the host: no process is looked up, no socket asked.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use bytemuck::Zeroable as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use tracer_ebpf::{Record, kind};

use crate::connection::Connections;
use crate::decode::{Blind, Fact, decode};
use crate::event::Event;
use crate::filter::{Filter, Mounts};
use crate::process::{self, Processes};
use crate::record::{Reader, Recorded, Recorder, Unreadable};
use crate::report::replay;
use crate::sink::escape::is_hostile;
use crate::sink::summary::{About, Missed, Moment, Summarizer};
use crate::sink::{Json, Page, Text};
use crate::snapshot::{self, pressure, sockets, walk};
use crate::time_wait::{self, Answer, SockDiag};
use crate::{broker, descendants, ledger, preflight, run, time_namespace};

/// No line is longer, whatever is in a record: paths are bounded, and nobody looks them up here.
const LINE: usize = 16 << 10;

/// Where events go: to each output at once.
struct Outputs {
    text: Text,
    json: Json,
    summary: Summarizer,
    page: Option<Page>,
    began: Instant,
    /// The events were made from records, so their lines are bounded.
    bounded: bool,
}

impl Outputs {
    fn new(began: Instant, with_page: bool, bounded: bool) -> Self {
        let page = with_page.then(|| Page::new(TimeZone::UTC));
        let summary = Summarizer::new(began, false, Some(5));
        Self { text: Text::new(TimeZone::UTC, false), json: Json::default(), summary, page, began, bounded }
    }

    /// Prints an event: one line that does nothing to a terminal, and one JSON object.
    fn event(&mut self, event: &Event) {
        let text = printed(|out| self.text.event(event, out));
        harmless(&text);
        if !matches!(event, Event::Start(_) | Event::Summary(_) | Event::Alert(_)) {
            assert_eq!(text.matches('\n').count(), 1, "one line: {text:?}");
        }
        let json = printed(|out| self.json.event(event, out));
        harmless(&json);
        assert_eq!(json.matches('\n').count(), 1, "one line: {json:?}");
        let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        let by_serde = serde_json::to_string(event).expect("JSON");
        assert_eq!(value, serde_json::from_str::<serde_json::Value>(&by_serde).expect("JSON"), "the same as serde's");
        assert!(!self.bounded || text.len() <= LINE && json.len() <= LINE, "{} and {} bytes", text.len(), json.len());
        match (event, self.page.take()) {
            (Event::Summary(summary), Some(page)) => {
                let page = page.finish(summary, Some("<script>"));
                harmless(&page);
                let scripts = page.to_ascii_lowercase().matches("<script").count();
                assert_eq!(scripts, 1, "no other script than its own");
            }
            (event, Some(mut page)) => {
                page.event(event);
                self.page = Some(page);
            }
            (_, None) => {}
        }
    }

    /// Counts and prints.
    fn live(&mut self, event: &Event) {
        self.summary.event(event);
        self.event(event);
    }

    /// Prints the summary of what was counted.
    fn finish(&mut self, now: Instant) {
        self.summary.pass(now);
        let missed = Missed { lost: 1, untracked: u64::MAX };
        let time = Timestamp::UNIX_EPOCH;
        let moment = Moment { time, now, missed, time_wait_sockets: Some(300), ledger: None };
        for about in [About::Recent, About::Run] {
            let summary = self.summary.summary(about, &moment);
            self.event(&Event::Summary(Box::new(summary)));
        }
    }
}

fn printed(print: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> String {
    let mut out = Vec::new();
    print(&mut out).expect("memory takes everything");
    String::from_utf8(out).expect("UTF-8")
}

fn harmless(text: &str) {
    let hostile = text.chars().find(|c| *c != '\n' && is_hostile(*c));
    assert_eq!(hostile, None, "{text:?}");
}

/// Bytes of the ring buffer, one record after another, through all steps to every output.
///
/// The first byte has options, and then each record has one byte more: what `sock_diag` answers next, and how much time
/// passes.
pub fn records(data: &[u8]) {
    let Some((&options, data)) = data.split_first() else { return };
    let has = |bit: u8| options & bit != 0;
    let (as_they_are, states) = (has(1), has(2));
    let blind = Blind { receive_reset: has(4), send_reset: has(8), exits: has(16) };
    let items: Vec<(u8, &[u8])> = data
        .chunks(1 + size_of::<Record>())
        .filter_map(|item| item.split_first().map(|(first, rest)| (*first, rest)))
        .collect();
    let answers = items.iter().map(|(byte, _)| match byte & 7 {
        0 => Answer::TimeWait,
        1 => Answer::FinWait2(Duration::from_secs(60)),
        2 => Answer::FinWait2(Duration::from_millis(u32::MAX.into())),
        3 => Answer::Alive,
        4 => Answer::Gone,
        5 => Answer::Replaced,
        6 => Answer::FinWait2(Duration::ZERO),
        _ => Answer::Unknown,
    });
    let processes = Processes::at(Path::new("/nonexistent"));
    let mut connections = Connections::new(processes, SockDiag::scripted(answers), states).blind(blind);
    let began = Instant::now();
    let mut outputs = Outputs::new(began, has(32), true);
    let (mut now, mut events) = (began, Vec::new());
    let (mut ended, mut changed, mut waiting) = (0, 0, 0);
    for (byte, bytes) in &items {
        let fact = if as_they_are { decode(bytes) } else { decode(&plausible(bytes)) };
        let Ok(fact) = fact else { continue };
        match fact {
            Fact::Ended(_) => ended += 1,
            Fact::Changed(_) => changed += 1,
            Fact::CloseWait(_) => waiting += 1,
            Fact::ResetAfterEnd { .. } => {}
        }
        connections.fact(fact, now, &mut events);
        now += [0, 5, 1_000, 120_000].map(Duration::from_millis)[usize::from(byte >> 6)];
        connections.poll(now, byte & 1 != 0, &mut events);
    }
    connections.finish(now, &mut events);
    assert_eq!(connections.ends(), (ended as u64, 0), "the books say so, too");
    let count = |is: fn(&Event) -> bool| events.iter().filter(|event| is(event)).count();
    assert_eq!(count(|event| matches!(event, Event::Close(_))), ended, "one close for each end, no more and no less");
    assert_eq!(count(|event| matches!(event, Event::CloseWait(_))), waiting);
    let ends_as_states = if states { ended } else { 0 };
    assert_eq!(count(|event| matches!(event, Event::State(_))), changed + ends_as_states);
    for event in &events {
        outputs.live(event);
    }
    outputs.finish(now);
    // What was printed can be recorded, and is the same when it is read.
    read_back(&events);
}

/// The same bytes as a record whose size, kind and states are some that there are: so that more is reached than a refusal.
fn plausible(bytes: &[u8]) -> Vec<u8> {
    let mut whole = [0; size_of::<Record>()];
    whole[..bytes.len()].copy_from_slice(bytes);
    let mut record = Record::zeroed();
    bytemuck::bytes_of_mut(&mut record).copy_from_slice(&whole);
    record.kind = [kind::CLOSE, kind::STATE, kind::CLOSE_WAIT, kind::RESET_AFTER_CLOSE][usize::from(record.kind % 4)];
    let state = |state: u8| (state - 1) % 12 + 1;
    for word in &mut record.states {
        let (of, at_ns) = tracer_ebpf::unpack_state(*word);
        *word = if of == 0 { 0 } else { tracer_ebpf::pack_state(state(of), at_ns) };
    }
    record.old_state = state(record.old_state.max(1));
    record.new_state = state(record.new_state.max(1));
    bytemuck::bytes_of(&record).to_vec()
}

/// A recording of events.
fn recorded(events: &[Event]) -> io::Result<Vec<u8>> {
    let mut recorder = Recorder::new(Vec::new())?;
    events.iter().try_for_each(|event| recorder.event(event))?;
    recorder.flush()?;
    Ok(recorder.into_inner())
}

/// All events of a recording, and why there are no more.
fn all_of(recording: &[u8]) -> (Vec<Event>, Result<(), Unreadable>) {
    let mut events = Vec::new();
    let mut reader = match Reader::new(recording) {
        Ok(reader) => reader,
        Err(why) => return (events, Err(why)),
    };
    let whole = loop {
        match reader.next() {
            Ok(Some(Recorded::Event(event))) => events.push(event),
            Ok(Some(Recorded::End(_)) | None) => break Ok(()),
            Err(why) => break Err(why),
        }
    };
    assert!(matches!(reader.next(), Ok(None)), "nothing comes after the end, nor after an error");
    (events, whole)
}

/// Events that are written and read are the same events.
fn read_back(events: &[Event]) {
    // A date that does not fit, or an event that is too long, is refused, and that is well.
    let Ok(first) = recorded(events) else { return };
    let (again, why) = all_of(&first);
    assert!(matches!(why, Err(Unreadable::Unfinished { .. })), "it has no end: {why:?}");
    assert_eq!(again.len(), events.iter().filter(|event| !matches!(event, Event::Summary(_))).count());
    assert_eq!(recorded(&again).expect("it was recorded once"), first, "the same bytes");
}

/// A file that is said to be a recording, to every output.
///
/// The first byte says what the others are: a whole file; one block of events; a block as LZ4 stores it; a file whose
/// checksums are set right, so that what is behind them is reached.
pub fn recording(data: &[u8]) {
    let Some((&mode, data)) = data.split_first() else { return };
    let file = match mode & 3 {
        0 => data.to_vec(),
        1 => file_of(&lz4_flex::block::compress(data), data.len()),
        2 => match data.split_first_chunk::<4>() {
            Some((len, stored)) => file_of(stored, u32::from_le_bytes(*len) as usize),
            None => return,
        },
        _ => with_checksums(data),
    };
    let (events, _) = all_of(&file);
    read_back(&events);
    let Ok(reader) = Reader::new(&file[..]) else { return };
    let mut outputs = Outputs::new(Instant::now(), mode & 4 != 0, false);
    let mut summaries = 0;
    replay(reader, &Filter::default(), &[], |event| {
        summaries += usize::from(matches!(event, Event::Summary(_)));
        outputs.event(event);
        Ok(())
    })
    .expect("memory takes everything");
    assert_eq!(summaries, 1, "one, at the end");
    for event in &events {
        outputs.summary.event(event);
    }
    outputs.finish(outputs.began + Duration::from_secs(1));
}

/// A file with one frame.
fn file_of(stored: &[u8], len: usize) -> Vec<u8> {
    let mut file = recorded(&[]).expect("memory takes everything");
    for number in [stored.len(), len] {
        file.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(stored);
    with_checksums(&file)
}

/// The same file; the checksums of its header and of each frame, as far as frames can be told, are right.
fn with_checksums(file: &[u8]) -> Vec<u8> {
    const HEADER: usize = 16;
    const FRAME: usize = 12;
    let mut file = file.to_vec();
    let Some(header) = file.first_chunk_mut::<HEADER>() else { return file };
    let sum = crc32fast::hash(&header[..12]).to_le_bytes();
    header[12..].copy_from_slice(&sum);
    let mut at = HEADER;
    while let Some(lengths) = file.get(at..at + 8) {
        let stored = lengths.iter().take(4).rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        let mut sum = crc32fast::Hasher::new();
        sum.update(lengths);
        let Some(block) = file.get(at + FRAME..at + FRAME + stored) else { break };
        sum.update(block);
        let sum = sum.finalize().to_le_bytes();
        file[at + 8..at + FRAME].copy_from_slice(&sum);
        at += FRAME + stored;
    }
    file
}

/// What `/proc` says, where others chose what is in it.
pub fn proc(data: &[u8]) {
    // As it is.
    let _ = (process::start_ticks(data), process::stat_comm(data), descendants::parse(data));
    for number in 0..60 {
        let _ = process::stat_field::<u64>(data, number);
    }
    // As a name: it hides nothing that stands behind it.
    let behind = b") S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 2000";
    let stat = [b"7 (", data, behind].concat();
    assert_eq!(process::start_ticks(&stat), Some(4711));
    assert_eq!(process::stat_comm(&stat), Some(data));
    for exits in [false, true] {
        let Some(path) = process::cgroup(data, exits) else { continue };
        assert!(!path.contains(&b'\n'), "a path is within one line");
        let path = String::from_utf8_lossy(path);
        if let Some(id) = process::container(&path) {
            assert!(id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id:?}");
        }
    }
    // As a cgroup: found again, whatever it is called.
    if !data.contains(&b'\n') {
        let file = [b"12:pids:/\n1:name=systemd:/x\n0::/", data, b"\n"].concat();
        let path = process::cgroup(&file, false).expect("it has one");
        let wanted: &[u8] = if data.is_empty() { b"/x" } else { &file[file.len() - data.len() - 2..file.len() - 1] };
        assert_eq!(path, wanted);
    }
    let text = String::from_utf8_lossy(data);
    let _ = (preflight::mounted(&text), Mounts::parse(&text), walk::mounted(&text).count());
    let shifts = time_namespace::parse(&text);
    let _ = (shifts.seen_ticks(u64::MAX), shifts.host_ticks(u64::MAX));
    let _ = (walk::inode(data, b"net:["), walk::inode(data, b"socket:["));
    let _ = (snapshot::counter(&text, "TCPTimeWaitOverflow"), run::sockets_in_time_wait(&text));
    // As the kernel's counters, before and after.
    let (began, now) = text.split_once("\n\n").unwrap_or((&text, &text));
    if let Some(reconciled) = ledger::compare_any(began, now) {
        // The programs have seen nothing here.
        assert_eq!(reconciled.percent, (reconciled.closed > 0).then_some(0.0), "{reconciled:?}");
    }
    // As something else in these files: what is wanted is found beside it.
    if !data.contains(&b'\n') {
        let files = |inuse: u32| {
            format!(
                "Tcp: ActiveOpens PassiveOpens\nTcp: 3 4 {text}\nIp: {text}\nIp: {text}\nTCP: inuse {inuse} {text}\n\
                 TCP6: inuse 6 {text}\nTcpExt: TW TWKilled\nTcpExt: 7 8 {text}\n"
            )
        };
        let reconciled = ledger::compare_any(&files(5), &files(2)).expect("all is there");
        assert_eq!((reconciled.closed, reconciled.slack), (3, 3));
    }
    for (first, last) in
        pressure::parse_range(&text).into_iter().chain(pressure::parse_reserved(&text).unwrap_or_default())
    {
        assert!(first <= last);
    }
    // As a mount point, escaped as the kernel does it: found again, and nothing else is.
    let escaped: String =
        text.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012");
    // The kernel escapes no other line ends, and `lines` takes one only before a line feed, which is.
    let mounts =
        format!("40 24 0:4 net:[7] /run/{escaped} rw shared:1 - nsfs nsfs rw\n41 24 0:5 / /c rw - cgroup2 c rw\n");
    let found: Vec<_> = walk::mounted(&mounts).collect();
    assert_eq!(found, [(7, format!("/run/{text}").into())]);
    assert_eq!(preflight::mounted(&mounts), [Path::new("/c")]);
}

/// What `sock_diag` and the broker answer.
pub fn replies(data: &[u8]) {
    let Some((&kind, body)) = data.split_first() else { return };
    let mut framed = Vec::with_capacity(16 + body.len());
    framed.extend_from_slice(&u32::try_from(16 + body.len()).unwrap_or(u32::MAX).to_ne_bytes());
    // SOCK_DIAG_BY_FAMILY, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP or another.
    let kind = [20, 2, 3, 1, u16::from(kind)][usize::from(kind % 5)];
    framed.extend_from_slice(&kind.to_ne_bytes());
    framed.extend_from_slice(&[0; 2]);
    framed.extend_from_slice(&1_u32.to_ne_bytes());
    framed.extend_from_slice(&[0; 4]);
    framed.extend_from_slice(body);
    for reply in [body, &framed[..], &[&framed[..], &[0; 3][..framed.len().wrapping_neg() & 3], &framed[..]].concat()] {
        let _ = time_wait::answer(reply, 1);
        let mut found = 0;
        let _ = sockets::read(reply, 1, &mut |_| found += 1);
        assert!(found <= reply.len() / 16, "each message has a header");
    }
    broker::read_any(body);
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What was found once, and what covers most: without a fuzzer.
    #[test]
    fn the_fuzz_corpus_passes() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let targets = [records, recording, proc, replies] as [fn(&[u8]); 4];
        for (name, target) in ["records", "recording", "proc", "replies"].into_iter().zip(targets) {
            let inputs: Vec<_> = fs::read_dir(corpus.join(name)).expect("it has a corpus").collect();
            assert!(inputs.len() > 10, "{name} has a corpus");
            for input in inputs {
                let path = input.expect("a directory").path();
                let bytes = fs::read(&path).expect("a file");
                let outcome = std::panic::catch_unwind(|| target(&bytes));
                assert!(outcome.is_ok(), "{} fails: see above", path.display());
            }
        }
    }
}
