//! The books of a run: what became of each close, and whether the kernel knows of others.
//!
//! What comes in: the programs' rows, one for each CPU; what user space did with their records; and the kernel's own counters of
//! tracer's network namespace, from files that are opened before the process is confined. What goes out: a [`Ledger`], which
//! says whether all of that agrees. Every number is counted where something happens, and none is taken from the others: or
//! nothing could ever disagree. What the kernel's counters cannot tell exactly is not called exact.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::time::Duration;

use anyhow::Context as _;
use tracer_ebpf::book::{COLUMNS, Column};

use crate::event::{Close, Final, FinalSource, Ledger, LedgerRow, Reconciled};

/// The programs' counters of one CPU, by [`Column`].
pub type Row = [u64; COLUMNS];

/// Between two readings that must agree: longer than any transition takes.
pub const PAUSE: Duration = Duration::from_millis(1);

/// What user space has done with the records of closes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Read from the ring buffer.
    pub read: u64,
    /// Closes that passed no filter here.
    pub filtered: u64,
    /// Closes that were sent to be written.
    pub passed: u64,
    /// In tracer's own network namespace: those that left a mini-socket (TIME_WAIT, FIN_WAIT2).
    pub mini_sockets: u64,
    /// There: those of which that is not known.
    pub maybe_mini_sockets: u64,
}

impl Tally {
    /// Counts a close in this network namespace `here`, whether or not it passes the filters.
    pub fn close(&mut self, close: &Close, here: Option<u32>) {
        if here == Some(close.netns) {
            self.fate(close.fate, close.fate_source);
        }
    }

    fn fate(&mut self, fate: Option<Final>, source: Option<FinalSource>) {
        match (fate, source) {
            (Some(Final::TimeWait), Some(FinalSource::Inferred)) => self.maybe_mini_sockets += 1,
            (Some(Final::TimeWait | Final::FinWait2), _) | (Some(Final::Reset), Some(FinalSource::Inferred)) => {
                self.mini_sockets += 1;
            }
            (_, Some(FinalSource::Inferred | FinalSource::SockDiag)) => self.maybe_mini_sockets += 1,
            _ => {}
        }
    }
}

/// Closes the books over these rows. `held`: closes whose end is still open. What was written is not known here: see
/// [`Ledger::written`].
///
/// Mini-sockets are judged where each close was read (none was filtered in the kernel, lost, or waits in the ring buffer) and
/// the kernel's counters stood still. That fewer were made than seen is wrong only as far as the closes that these counters know
/// were seen, and TIME_WAIT had room.
pub fn close_books(rows: &[Row], tally: &Tally, held: u64, reconciled: Option<Reconciled>) -> Ledger {
    let column = |row: &Row, column: Column| row[column as usize];
    let cpus: Vec<LedgerRow> = rows
        .iter()
        .enumerate()
        .map(|(cpu, row)| LedgerRow {
            cpu,
            // What was no connection, after all, is no close.
            seen: column(row, Column::Seen).saturating_sub(column(row, Column::Void)),
            emitted: column(row, Column::Emitted),
            filtered: column(row, Column::Filtered),
            lost: column(row, Column::Lost),
            untracked: column(row, Column::Untracked),
        })
        .filter(|row| row.seen != 0 || row.emitted != 0 || !row.balances())
        .collect();
    let sum = |of: fn(&LedgerRow) -> u64| cpus.iter().map(of).sum::<u64>();
    // Of what was filtered in the kernel, or lost, nothing is known.
    let all_read = sum(|row| row.filtered + row.lost + row.untracked) == 0;
    let emitted = sum(|row| row.emitted);
    let reconciled = reconciled.map(|reconciled| {
        let (seen, maybe) = (tally.mini_sockets, tally.maybe_mini_sockets + held);
        // Closes before the kernel's counters were read first, and since they were read last: these do not know them.
        let here = rows.iter().fold(0, |sum: u64, row| sum.wrapping_add(column(row, Column::SeenHere)));
        let besides = here.saturating_sub(reconciled.seen).saturating_add(reconciled.time_wait_overflow.unwrap_or(0));
        let exact = all_read && reconciled.is_exact() && emitted == tally.read;
        Reconciled {
            mini_sockets_seen: all_read.then_some(seen),
            mini_sockets_maybe: all_read.then_some(maybe),
            mini_sockets_agree: reconciled
                .made_mini_sockets()
                .filter(|_| exact)
                .map(|made| (seen.saturating_sub(besides)..=seen + maybe).contains(&made)),
            ..reconciled
        }
    });
    Ledger {
        seen: sum(|row| row.seen),
        written: tally.passed,
        filtered_kernel: sum(|row| row.filtered),
        filtered_user: tally.filtered,
        lost: sum(|row| row.lost + row.untracked),
        untracked: sum(|row| row.untracked),
        waiting: emitted.saturating_sub(tally.passed + tally.filtered),
        emitted,
        read: tally.read,
        balanced: cpus.iter().all(LedgerRow::balances)
            && emitted >= tally.read
            && tally.read == tally.passed + tally.filtered + held,
        cpus,
        reconciled,
    }
}

/// What `--strict` complains of: that not every close was seen, and is in the output or left out by a filter; or that nothing
/// was there to compare that with. `records` were lost, of whatever kind.
pub fn complaint(ledger: &Ledger, records: u64) -> Option<String> {
    let Ledger { seen, lost, untracked, reconciled, .. } = ledger;
    let missing =
        reconciled.as_ref().filter(|reconciled| reconciled.closed > reconciled.seen.saturating_add(reconciled.slack));
    if *untracked > 0 {
        Some(format!(
            "{lost} of {seen} closes are lost, {untracked} of them because the kernel had no memory to follow them"
        ))
    } else if *lost > 0 || records > 0 {
        Some(format!(
            "{lost} of {seen} closes are lost ({records} records in all): whoever reads stdout was too slow; --ring-size gives \
             more room"
        ))
    } else if !ledger.balanced {
        Some(
            "the counts of closes do not agree, which is an error in tracer: see `ledger` in the summary of --json"
                .to_owned(),
        )
    } else if let Some(Reconciled { seen, closed, .. }) = missing {
        Some(format!("{closed} sockets closed in its network namespace by the kernel's counters, and {seen} were seen"))
    } else if let Some((made, least, most)) = reconciled.as_ref().and_then(Reconciled::wrong_mini_sockets) {
        Some(format!(
            "{made} sockets were left in TIME_WAIT or FIN_WAIT2 in its network namespace by the kernel's counters, and {least} to \
             {most} were seen"
        ))
    } else if reconciled.is_none() {
        Some(format!("closes were not compared with {WITNESS}, which cannot be read: see the warnings"))
    } else {
        None
    }
}

/// What closes are compared with.
const WITNESS: &str = "the kernel's own counters (/proc/net/snmp, sockstat, netstat)";

/// For the first line of the output: that they are compared with nothing, because of this error.
pub fn without_witness(error: &anyhow::Error) -> String {
    format!("closes are not compared with {WITNESS}, and --strict fails: {error:#}; mount /proc with all that is in it")
}

/// Whether the rows are whole: while the programs run, one may have counted an end, and not yet what became of it.
pub fn is_whole(rows: &[Row]) -> bool {
    rows.iter().all(is_whole_row)
}

fn is_whole_row(row: &Row) -> bool {
    let parts = [Column::Emitted, Column::Filtered, Column::Lost, Column::Untracked, Column::Void];
    row[Column::Seen as usize] == parts.iter().map(|part| row[*part as usize]).sum::<u64>()
}

/// Records that the programs wrote, over all rows.
pub fn emitted(rows: &[Row]) -> u64 {
    rows.iter().map(|row| row[Column::Emitted as usize]).sum()
}

/// Reads the rows until each has been whole, at most so many times. (Of many busy CPUs there is always one that is counting.)
///
/// # Errors
/// Those of `read`.
pub fn whole<E>(attempts: u32, mut read: impl FnMut() -> Result<Vec<Row>, E>) -> Result<Vec<Row>, E> {
    let mut rows = read()?;
    for _ in 1..attempts {
        if is_whole(&rows) {
            break;
        }
        std::thread::sleep(PAUSE);
        for (row, again) in rows.iter_mut().zip(read()?) {
            if !is_whole_row(row) {
                *row = again;
            }
        }
    }
    Ok(rows)
}

/// What is known of the sockets of tracer's network namespace at one moment. All but the last two are the kernel's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Reading {
    /// `ActiveOpens`: SYNs sent to connect, whatever became of them.
    active: u64,
    /// `PassiveOpens`: sockets cloned from a listener.
    passive: u64,
    /// `inuse` of TCP and TCP6: sockets in any state but CLOSE and TIME_WAIT; those that listen are among them.
    in_use: u64,
    /// `TW` and `TWKilled`: mini-sockets made, by how long they last. (Not: "killed".)
    mini_sockets: Option<u64>,
    /// `tw` of TCP: mini-sockets that there are now.
    mini_sockets_open: Option<u64>,
    /// `TCPTimeWaitOverflow`: those for which there was no room.
    overflow: Option<u64>,
    /// The programs' count of the closes that these counters know of.
    seen: u64,
    /// The programs' count of listeners that were made, less those that have ended.
    listeners: u64,
}

impl Reading {
    /// What the kernel's files of these names say; the programs' counts are 0.
    fn of(snmp: &str, sockstat: &str, sockstat6: &str, netstat: &str) -> anyhow::Result<Self> {
        let missing = |what| anyhow::anyhow!("/proc/net has no {what}");
        let [tw, killed, overflow] =
            ["TW", "TWKilled", "TCPTimeWaitOverflow"].map(|name| in_table(netstat, "TcpExt:", name));
        Ok(Self {
            active: in_table(snmp, "Tcp:", "ActiveOpens").ok_or_else(|| missing("ActiveOpens"))?,
            passive: in_table(snmp, "Tcp:", "PassiveOpens").ok_or_else(|| missing("PassiveOpens"))?,
            in_use: in_line(sockstat, "TCP:", "inuse")
                .ok_or_else(|| missing("TCP: inuse"))?
                .saturating_add(in_line(sockstat6, "TCP6:", "inuse").unwrap_or(0)),
            mini_sockets: tw.zip(killed).map(|(tw, killed)| tw.wrapping_add(killed)),
            mini_sockets_open: in_line(sockstat, "TCP:", "tw"),
            overflow,
            ..Self::default()
        })
    }

    /// How far it moved until `later`, in sockets. Not counted: mini-sockets that went, which no other number knows of.
    fn moved(&self, later: &Self) -> u64 {
        [
            later.active.wrapping_sub(self.active),
            later.passive.wrapping_sub(self.passive),
            later.in_use.abs_diff(self.in_use),
            later.mini_sockets.unwrap_or(0).wrapping_sub(self.mini_sockets.unwrap_or(0)),
            later.seen.wrapping_sub(self.seen),
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

/// The kernel's own counters, to be compared with what was seen.
#[derive(Debug)]
pub struct Witness {
    netns: u32,
    files: Files,
    began: Reading,
    /// How far the counters moved while they were read at the beginning.
    slack: u64,
}

#[derive(Debug)]
struct Files {
    snmp: File,
    sockstat: File,
    /// Not where the kernel has no IPv6.
    sockstat6: Option<File>,
    netstat: File,
}

impl Witness {
    /// Opens the files and begins to compare. To be called once all programs are attached, and before files cannot be opened;
    /// `netns`: inode number of the network namespace of this process.
    ///
    /// # Errors
    /// A file cannot be opened or read, or does not hold what it should; or the error of `rows`.
    pub fn begin(netns: u32, rows: impl Fn() -> anyhow::Result<Vec<Row>>) -> anyhow::Result<Self> {
        let files = Files {
            snmp: open("/proc/net/snmp")?,
            sockstat: open("/proc/net/sockstat")?,
            sockstat6: File::open("/proc/net/sockstat6").ok(),
            netstat: open("/proc/net/netstat")?,
        };
        let mut witness = Self { netns, files, began: Reading::default(), slack: 0 };
        let mut last = witness.read(&rows)?;
        for _ in 0..5 {
            std::thread::sleep(PAUSE);
            let next = witness.read(&rows)?;
            witness.slack = last.moved(&next);
            last = next;
            if witness.slack == 0 {
                break;
            }
        }
        witness.began = last;
        Ok(witness)
    }

    /// Compares, with as many readings as it takes until two of them agree, or `attempts`. The programs must be attached still.
    ///
    /// # Errors
    /// As for [`Witness::begin`].
    pub fn compare(&self, attempts: u32, rows: impl Fn() -> anyhow::Result<Vec<Row>>) -> anyhow::Result<Reconciled> {
        let mut last = self.read(&rows)?;
        let mut slack = u64::MAX;
        for _ in 0..attempts {
            std::thread::sleep(PAUSE);
            let next = self.read(&rows)?;
            slack = last.moved(&next);
            last = next;
            // Where they do not agree although nothing moves, something may be under way on a CPU that was kept from its work.
            if slack == 0 && reconcile(self.netns, &self.began, &last, 0).seen_all() {
                break;
            }
        }
        Ok(reconcile(self.netns, &self.began, &last, self.slack.saturating_add(slack)))
    }

    fn read(&self, rows: &impl Fn() -> anyhow::Result<Vec<Row>>) -> anyhow::Result<Reading> {
        let Files { snmp, sockstat, sockstat6, netstat } = &self.files;
        let (snmp, sockstat, netstat) = (text(snmp)?, text(sockstat)?, text(netstat)?);
        let sockstat6 = sockstat6.as_ref().map_or(Ok(String::new()), text)?;
        let rows = rows()?;
        let sum = |column: Column| rows.iter().fold(0, |sum: u64, row| sum.wrapping_add(row[column as usize]));
        let (seen, listeners) = (sum(Column::SeenHere), sum(Column::ListenersHere));
        Ok(Reading { seen, listeners, ..Reading::of(&snmp, &sockstat, &sockstat6, &netstat)? })
    }
}

/// What must have closed between two readings: what was opened, and what was open before and is not now. (Those that listen are
/// in use, too, and close without being closes.)
fn reconcile(netns: u32, began: &Reading, now: &Reading, slack: u64) -> Reconciled {
    let signed = |now: u64, began: u64| now.wrapping_sub(began).cast_signed();
    let active_opens = now.active.wrapping_sub(began.active);
    let passive_opens = now.passive.wrapping_sub(began.passive);
    let closed = active_opens
        .wrapping_add(passive_opens)
        .cast_signed()
        .wrapping_sub(signed(now.in_use, began.in_use))
        .wrapping_add(signed(now.listeners, began.listeners));
    let since = |of: fn(&Reading) -> Option<u64>| of(now).zip(of(began)).map(|(now, began)| now.wrapping_sub(began));
    let (closed, seen) = (u64::try_from(closed).unwrap_or(0), now.seen.wrapping_sub(began.seen));
    Reconciled {
        netns,
        closed,
        seen,
        slack,
        percent: percent(closed, seen, slack),
        active_opens,
        passive_opens,
        mini_sockets: since(|reading| reading.mini_sockets),
        mini_sockets_grown: since(|reading| reading.mini_sockets_open).map(u64::cast_signed),
        mini_sockets_seen: None,
        mini_sockets_maybe: None,
        mini_sockets_agree: None,
        time_wait_overflow: since(|reading| reading.overflow),
    }
}

/// Compares any two texts that may be all the kernel's files in one: for the fuzz targets.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn compare_any(began: &str, now: &str) -> Option<Reconciled> {
    let [began, now] = [began, now].map(|text| Reading::of(text, text, text, text).ok());
    let (began, now) = began.zip(now)?;
    Some(reconcile(0, &began, &now, began.moved(&now)))
}

/// Rounded down, so that 100 is said of all only, whatever the slack; above it where more was seen than can have closed.
#[expect(clippy::cast_precision_loss, reason = "2^53 closes take a long time")]
fn percent(closed: u64, seen: u64, slack: u64) -> Option<f64> {
    match (closed, seen) {
        (0, 0) => None,
        _ if seen.checked_sub(closed).is_some_and(|more| more <= slack) => Some(100.0),
        _ => Some((seen as f64 * 1_000.0 / closed.max(1) as f64).floor() / 10.0),
    }
}

fn open(path: &str) -> anyhow::Result<File> {
    File::open(path).with_context(|| path.to_owned())
}

fn text(mut file: &File) -> io::Result<String> {
    // From the beginning it is written anew.
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// A value of a table of two lines, the first of which has the names.
fn in_table(text: &str, table: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter(|line| line.split(' ').next() == Some(table));
    let at = lines.next()?.split(' ').position(|word| word == name)?;
    lines.next()?.split(' ').nth(at)?.parse().ok()
}

/// The value behind its name.
fn in_line(text: &str, line: &str, name: &str) -> Option<u64> {
    let mut words = text.lines().find(|words| words.split(' ').next() == Some(line))?.split(' ');
    words.find(|word| *word == name)?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: usize = Column::Seen as usize;

    fn row(seen: u64, emitted: u64, filtered: u64, lost: u64) -> Row {
        [seen, emitted, filtered, lost, 0, 0, 0, 0]
    }

    fn tally(read: u64, filtered: u64) -> Tally {
        Tally { read, filtered, passed: read - filtered, ..Tally::default() }
    }

    #[test]
    fn sums_are_those_of_all_cpus() {
        let mut second = row(7, 3, 0, 1);
        second[Column::Untracked as usize] = 1;
        second[Column::Void as usize] = 2;
        let ledger = close_books(&[row(10, 6, 3, 1), [0; COLUMNS], second], &tally(9, 2), 0, None);
        assert!(ledger.balanced);
        assert_eq!((ledger.seen, ledger.emitted, ledger.written, ledger.waiting), (15, 9, 7, 0));
        assert_eq!((ledger.filtered_kernel, ledger.filtered_user, ledger.lost, ledger.untracked), (3, 2, 3, 1));
        assert_eq!(ledger.cpus.iter().map(|row| (row.cpu, row.seen)).collect::<Vec<_>>(), [(0, 10), (2, 5)]);
    }

    #[test]
    fn what_was_forgotten_shows() {
        let balanced = |rows: &[Row], tally: &Tally, held| close_books(rows, tally, held, None).balanced;
        assert!(balanced(&[row(5, 5, 0, 0)], &tally(5, 0), 0));
        // An end of which nothing became; on one CPU too many, on another too few.
        assert!(!balanced(&[row(6, 5, 0, 0)], &tally(5, 0), 0));
        assert!(!balanced(&[row(6, 5, 0, 0), row(4, 5, 0, 0)], &tally(10, 0), 0));
        // A record that was read, and is nowhere; one that is held; one that was read and never written.
        assert!(!balanced(&[row(5, 5, 0, 0)], &Tally { passed: 4, ..tally(5, 0) }, 0));
        assert!(balanced(&[row(5, 5, 0, 0)], &Tally { passed: 4, ..tally(5, 0) }, 1));
        assert!(!balanced(&[row(5, 5, 0, 0)], &tally(6, 0), 0));
    }

    #[test]
    fn what_strict_complains_of() {
        let reconciled = |closed, seen, slack| {
            let began = Reading::default();
            Some(reconcile(1, &began, &Reading { active: closed, seen, ..began }, slack))
        };
        let complaint = |row: Row, read, reconciled, records| {
            complaint(&close_books(&[row], &tally(read, 0), 0, reconciled), records)
        };
        assert_eq!(complaint(row(5, 3, 2, 0), 3, reconciled(5, 5, 0), 0), None);
        // What moved while it was read is no reason.
        assert_eq!(complaint(row(5, 5, 0, 0), 5, reconciled(6, 5, 1), 0), None);
        let has = |said: Option<String>, word: &str| {
            assert!(said.as_ref().is_some_and(|said| said.contains(word)), "{said:?}")
        };
        has(complaint(row(5, 5, 0, 0), 5, None, 0), "not compared");
        has(complaint(row(5, 3, 0, 2), 3, None, 2), "2 of 5 closes are lost");
        has(complaint(row(5, 5, 0, 0), 5, None, 1), "1 records in all");
        has(complaint([5, 4, 0, 0, 1, 0, 0, 0], 4, None, 0), "no memory");
        has(complaint(row(6, 5, 0, 0), 5, None, 0), "do not agree");
        has(complaint(row(5, 5, 0, 0), 5, reconciled(6, 5, 0), 0), "6 sockets closed");
    }

    #[test]
    fn mini_sockets_are_judged() {
        // Made, seen, not known, without room; of five closes here. One of the first two is changed.
        let ledger = |made, seen, maybe, overflow, of: fn(&mut Row, &mut Reading)| {
            let (mut row, mut now) = (row(5, 5, 0, 0), Reading { active: 5, seen: 5, ..Reading::default() });
            row[Column::SeenHere as usize] = 5;
            (now.mini_sockets, now.overflow) = (Some(made), Some(overflow));
            of(&mut row, &mut now);
            let began =
                Reading { mini_sockets: Some(0), mini_sockets_open: Some(10), overflow: Some(0), ..Reading::default() };
            let tally = Tally { mini_sockets: seen, maybe_mini_sockets: maybe, ..tally(5, 0) };
            close_books(&[row], &tally, 0, Some(reconcile(1, &began, &now, 0)))
        };
        let agree = |made, seen, maybe, overflow| {
            let ledger = ledger(made, seen, maybe, overflow, |_, _| {});
            let agree = ledger.reconciled.as_ref().and_then(|reconciled| reconciled.mini_sockets_agree);
            // What is wrong is complained of, and nothing else is.
            assert_eq!(agree, Some(complaint(&ledger, 0).is_none()));
            agree.expect("it is judged")
        };
        assert!(agree(3, 3, 0, 0) && agree(3, 2, 1, 0) && agree(2, 2, 1, 0) && agree(2, 3, 0, 1));
        assert!(!agree(4, 3, 0, 0) && !agree(4, 2, 1, 0) && !agree(1, 2, 1, 0) && !agree(1, 3, 0, 1));
        let said = complaint(&ledger(4, 2, 1, 0, |_, _| {}), 0).expect("it is wrong");
        assert!(said.starts_with("4 sockets were left in TIME_WAIT or FIN_WAIT2") && said.contains("2 to 3 were seen"));
        // More of them exist than were made, by the other counter; that some have gone means nothing.
        let grown = |of| {
            let reconciled = ledger(3, 3, 0, 0, of).reconciled.expect("it was given");
            (reconciled.mini_sockets_grown, reconciled.mini_sockets_agree, reconciled.wrong_mini_sockets())
        };
        assert_eq!(grown(|_, now| now.mini_sockets_open = Some(2)), (Some(-8), Some(true), None));
        assert_eq!(grown(|_, now| now.mini_sockets_open = Some(13)), (Some(3), Some(true), None));
        assert_eq!(grown(|_, now| now.mini_sockets_open = Some(14)), (Some(4), Some(false), Some((4, 3, 3))));
        // A close that the kernel's counters do not know, before they were read or since: it may have left one.
        let besides = |made| {
            let ledger = ledger(made, 3, 0, 0, |_, now| (now.active, now.seen) = (4, 4));
            ledger.reconciled.expect("it was given").mini_sockets_agree
        };
        assert_eq!([1, 2, 3, 4].map(besides), [Some(false), Some(true), Some(true), Some(false)]);
        // Not judged: something is filtered, waits to be read, or is not counted by the kernel.
        let unjudged: [fn(&mut Row, &mut Reading); 3] = [
            |row, _| (row[Column::Emitted as usize], row[Column::Filtered as usize]) = (4, 1),
            |row, _| (row[SEEN], row[Column::Emitted as usize]) = (6, 6),
            |_, now| now.mini_sockets = None,
        ];
        for of in unjudged {
            assert_eq!(ledger(4, 2, 1, 0, of).reconciled.expect("it was given").mini_sockets_agree, None);
        }
    }

    #[test]
    fn what_is_inferred_of_a_mini_socket_is_not_known() {
        let counted = |fate, source| {
            let mut tally = Tally::default();
            tally.fate(Some(fate), Some(source));
            (tally.mini_sockets, tally.maybe_mini_sockets)
        };
        assert_eq!(counted(Final::TimeWait, FinalSource::Fin), (1, 0));
        assert_eq!(counted(Final::TimeWait, FinalSource::Inferred), (0, 1));
        assert_eq!(counted(Final::FinWait2, FinalSource::SockDiag), (1, 0));
        assert_eq!(counted(Final::Reset, FinalSource::Inferred), (1, 0));
        assert_eq!(counted(Final::Reset, FinalSource::State), (0, 0));
        assert_eq!(counted(Final::Unknown, FinalSource::SockDiag), (0, 1));
    }

    #[test]
    fn rows_are_read_until_they_are_whole() {
        let mut reads = 0;
        let mut read = || {
            reads += 1;
            Ok::<_, ()>(vec![row(5, if reads < 3 { 4 } else { 5 }, 0, 0)])
        };
        assert_eq!(whole(10, &mut read).expect("it is read")[0][SEEN], 5);
        // Never all at once.
        let (torn, fine) = (row(5, 4, 0, 0), row(5, 5, 0, 0));
        let mut readings = [vec![torn, fine], vec![fine, torn]].into_iter();
        let rows = whole(10, || readings.next().ok_or(())).expect("two readings are enough");
        assert!(rows.iter().all(is_whole_row));
        assert_eq!(reads, 3);
        assert!(!is_whole(&whole(2, || Ok::<_, ()>(vec![row(5, 4, 0, 0)])).expect("it is read")));
    }

    #[test]
    fn what_closed_by_the_kernels_count() {
        let began = Reading { active: 100, passive: 50, in_use: 12, seen: 7, ..Reading::default() };
        // Six were opened; two of them are open, with one more listener, and two that were open before are not.
        let now =
            Reading { active: 103, passive: 53, in_use: 13, seen: 13, listeners: 1, mini_sockets: Some(9), ..began };
        let reconciled = reconcile(1, &began, &now, 0);
        assert_eq!((reconciled.closed, reconciled.seen, reconciled.percent), (6, 6, Some(100.0)));
        assert_eq!((reconciled.active_opens, reconciled.passive_opens), (3, 3));
        assert_eq!(reconciled.mini_sockets, None, "not known at the beginning");
        // Fewer listeners than before, and more closes than opens.
        let now = Reading { in_use: 3, seen: 14, listeners: u64::MAX, ..began };
        let reconciled = reconcile(1, &began, &now, 0);
        assert_eq!((reconciled.closed, reconciled.seen), (8, 7));
        assert_eq!(reconciled.percent, Some(87.5));
        assert!(!reconciled.seen_all() && reconciled.is_exact());
    }

    #[test]
    fn never_rounded_up_to_all() {
        let reconciled = |closed, seen, slack| {
            let began = Reading::default();
            reconcile(1, &began, &Reading { active: closed, seen, ..began }, slack)
        };
        assert_eq!(reconciled(100_000, 99_999, 0).percent, Some(99.9));
        assert_eq!(reconciled(0, 0, 0).percent, None);
        // What moved while it was read may be the whole difference.
        assert_eq!(reconciled(100_000, 99_999, 1).percent, Some(99.9));
        assert_eq!(reconciled(99_999, 100_000, 1).percent, Some(100.0));
        assert_eq!(reconciled(100_000, 99_998, 1).percent, Some(99.9));
    }

    #[test]
    fn the_kernels_files() {
        let snmp = "Ip: Forwarding\nIp: 1\nTcp: RtoMin ActiveOpens MaxConn PassiveOpens\nTcp: 200 12 -1 34\nTcpX: 1\n";
        assert_eq!(in_table(snmp, "Tcp:", "ActiveOpens"), Some(12));
        assert_eq!(in_table(snmp, "Tcp:", "PassiveOpens"), Some(34));
        for (table, name) in [("Tcp:", "MaxConn"), ("Tcp:", "Missing"), ("Udp:", "ActiveOpens"), ("TcpX:", "1")] {
            assert_eq!(in_table(snmp, table, name), None, "{table} {name}");
        }
        let sockstat = "sockets: used 30\nTCP: inuse 3 orphan 0 tw 5 alloc 3 mem 52\nTCP6: inuse 1\n";
        assert_eq!(in_line(sockstat, "TCP:", "inuse"), Some(3));
        assert_eq!(in_line(sockstat, "TCP6:", "inuse"), Some(1));
        assert_eq!(in_line(sockstat, "UDP:", "inuse"), None);
        assert_eq!(in_line(sockstat, "TCP:", "mem"), Some(52));
        assert_eq!(in_line(sockstat, "TCP6:", "tw"), None);
    }
}
