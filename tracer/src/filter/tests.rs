use std::net::SocketAddr;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser as _};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::Value;

use super::*;
use crate::cli::{Cli, Command};
use crate::event::{Family, Lost, Protocol, Role, Source, State, TcpState};

fn parse(args: &[&str]) -> Result<Args, clap::Error> {
    match Cli::try_parse_from(["tracer", "run"].iter().chain(args))?.command {
        Command::Run(run) => Ok(*run.filter),
        other => panic!("{other:?}"),
    }
}

/// Why the filters, which can be parsed, are refused.
fn refused(args: &[&str]) -> String {
    let refusal = parse(args).expect("they are well formed").resolve(None).expect_err("refused");
    assert_eq!(refusal.code, 2, "{}", refusal.message);
    refusal.message
}

#[test]
fn every_filter_is_shown_as_it_was_given() {
    let args = [
        "--pid 1 --pid 2 --port 80 --comm nginx --cgroup /a --peer 10.0.0.0/8 --peer ::1/128 --local 192.0.2.1/32",
        "--netns blue --cause unused --cause no_reuse --closed-by local --final time_wait --min-duration 1.5s",
    ]
    .join(" ");
    let shown = parse(&args.split(' ').collect::<Vec<_>>()).expect("options").shown();
    assert_eq!(shown.join(" "), args);
    // Each that there is.
    let options = Cli::command().find_subcommand("run").expect("it exists").clone();
    let filters = options.get_arguments().filter(|arg| arg.get_help_heading() == Some(HEADING));
    for option in filters.map(|arg| arg.get_long().expect("it has a name")) {
        assert!(shown.iter().any(|shown| shown.starts_with(&format!("--{option} "))), "{option}");
    }
}

#[test]
fn words_are_those_of_the_contract() {
    fn same<T: ValueEnum + serde::Serialize>() {
        for value in T::value_variants() {
            assert_eq!(serde_json::to_value(value).expect("a word"), Value::String(word(value)));
        }
    }
    same::<Cause>();
    same::<ClosedBy>();
    same::<Final>();
}

#[test]
fn networks() {
    let cases = [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
        ("::/0", "::/0"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ];
    for (text, expected) in cases {
        assert_eq!(network(text).map(|network| network.to_string()).as_deref(), Ok(expected), "{text}");
    }
    for text in
        ["", "10", "10.0.0.0/33", "10.0.0.0/", "/8", "10.0.0/8", "::/129", "localhost", "10.0.0.0/-1", "1.2.3.4:80"]
    {
        assert!(network(text).is_err(), "{text}");
    }
    for (text, hint) in
        [("10.0.0.5/8", "10.0.0.0/8"), ("2001:db8::1/32", "2001:db8::/32"), ("::ffff:10.0.0.5/104", "10.0.0.0/8")]
    {
        let said = network(text).expect_err("host bits");
        assert!(said.contains(hint), "{said}");
        assert_eq!(parse(&["--peer", text]).expect_err("host bits").exit_code(), 2);
    }
}

#[test]
fn what_can_match_nothing_is_refused() {
    let cases: [(&[&str], &str); 16] = [
        (&["--final", "fin_wait2", "--closed-by", "remote"], "FIN_WAIT2"),
        (&["--final", "fin_wait2", "--closed-by", "remote", "--closed-by", "none"], "FIN_WAIT2"),
        (&["--final", "time_wait", "--closed-by", "none"], "FINs of both"),
        (&["--final", "timed_out", "--cause", "unused"], "timed_out"),
        (&["--cause", "timeout", "--final", "closed", "--final", "unknown"], "timed_out"),
        (&["--cause", "reset_by_local", "--final", "time_wait"], "reset"),
        (&["--cause", "reset_by_peer", "--closed-by", "none"], "RST"),
        (&["--cause", "process_exit", "--closed-by", "remote"], "process_exit"),
        (&["--cause", "idle_timeout", "--cause", "no_reuse", "--closed-by", "none"], "idle_timeout"),
        (&["--peer", "10.0.0.0/8", "--local", "::1"], "family"),
        (&["--peer", "ff02::1"], "multicast"),
        (&["--peer", "127.0.0.1", "--peer", "0.0.0.0"], "0.0.0.0/0 is all"),
        (&["--local", "::"], "::/0 is all"),
        (&["--netns", "no-such-name"], "/run/netns/no-such-name"),
        (&["--netns", "/proc/self/ns/mnt"], "no network namespace"),
        (&["--netns", "/dev/null"], "no network namespace"),
    ];
    for (args, reason) in cases {
        let said = refused(args);
        assert!(said.contains(reason), "{args:?}: {said}");
    }
}

#[test]
fn what_might_match_is_not_refused() {
    let cases: [&[&str]; 12] = [
        &["--final", "time_wait", "--closed-by", "remote"],
        &["--final", "fin_wait2", "--closed-by", "both"],
        &["--final", "fin_wait2", "--closed-by", "remote", "--closed-by", "local"],
        &["--final", "fin_wait2", "--final", "closed", "--closed-by", "remote"],
        &["--final", "time_wait", "--cause", "unused"],
        &["--final", "reset", "--cause", "request_close"],
        &["--final", "timed_out", "--cause", "timeout", "--closed-by", "none"],
        &["--cause", "process_exit", "--closed-by", "local"],
        &["--cause", "unknown", "--closed-by", "none"],
        &["--peer", "10.0.0.0/8", "--peer", "::/0", "--local", "::1"],
        &["--netns", "/proc/self/ns/net"],
        &["--min-duration", "10s"],
    ];
    for args in cases {
        let filter = parse(args).expect("well formed").resolve(Some(Duration::from_secs(10)));
        assert!(filter.is_ok(), "{args:?}: {filter:?}");
    }
    let short = parse(&["--min-duration", "11s"]).expect("well formed").resolve(Some(Duration::from_secs(10)));
    assert!(short.expect_err("refused").message.contains("--duration"));
}

#[test]
fn a_namespace_by_its_path_is_that_by_its_number() {
    let own = fs::metadata("/proc/self/ns/net").expect("/proc").ino();
    for netns in ["/proc/self/ns/net", &format!("/proc/{}/ns/net", std::process::id()), &own.to_string()] {
        let filter = parse(&["--netns", netns]).expect("well formed").resolve(None).expect("it exists");
        assert_eq!(filter.netns.iter().map(|netns| u64::from(*netns)).collect::<Vec<_>>(), [own], "{netns}");
    }
}

#[test]
fn recordings_are_not_compared_with_this_host() {
    let args = parse(&["--netns", "1", "--cgroup", "/no/such//cgroup/"]).expect("well formed");
    let filter = args.on_record().expect("nothing is looked up");
    assert_eq!((filter.netns, filter.cgroups), (vec![1], vec!["/no/such/cgroup".to_owned()]));
    let named = parse(&["--netns", "blue"]).expect("well formed").on_record().expect_err("a name");
    assert!(named.message.contains("numbers"), "{}", named.message);
    assert!(parse(&["--cgroup", "relative"]).expect("well formed").on_record().is_err());
}

#[test]
fn cgroups_by_their_path_and_as_mounted() {
    let directory = tempfile::tempdir().expect("a directory");
    let base = directory.path().to_str().expect("UTF-8");
    for path in ["v2/system.slice/nginx.service", "memory/docker/x", "part/inner"] {
        fs::create_dir_all(directory.path().join(path)).expect("a directory");
    }
    let mounts = Mounts::parse(&format!(
        "\
26 24 0:23 / {base} ro shared:7 - tmpfs tmpfs ro
27 26 0:24 / {base}/v2 rw - cgroup2 cgroup2 rw
28 26 0:25 / {base}/memory rw - cgroup cgroup rw,memory
29 26 0:24 /machine.slice {base}/part rw - cgroup2 none rw
garbage"
    ));
    let nginx = "/system.slice/nginx.service";
    let cases = [
        (nginx.to_owned(), nginx),
        (format!("{nginx}/"), nginx),
        (format!("{base}/v2{nginx}/"), nginx),
        (format!("{base}/v2"), "/"),
        ("/".to_owned(), "/"),
        ("/docker/x".to_owned(), "/docker/x"),
        (format!("{base}/memory/docker"), "/docker"),
        (format!("{base}/part/inner"), "/machine.slice/inner"),
        ("/machine.slice/inner".to_owned(), "/machine.slice/inner"),
    ];
    for (path, expected) in cases {
        assert_eq!(mounts.cgroup(&path).as_deref(), Ok(expected), "{path}");
    }
    for path in ["/nginx.service", "/system.slice/nginx", "nginx.service", "", "/system.slice/../docker", "/docker/x/y"]
    {
        assert!(mounts.cgroup(path).is_err(), "{path}");
    }
    // Where none is mounted, nothing is known of them.
    assert_eq!(Mounts::default().cgroup("/a").as_deref(), Ok("/a"));
}

#[test]
fn a_cgroup_has_those_below_it() {
    for (cgroup, asked, expected) in [
        ("/a", "/a", true),
        ("/a/b", "/a", true),
        ("/a/b (deleted)", "/a/b", true),
        ("/ab", "/a", false),
        ("/a", "/a/b", false),
        ("/x/a", "/a", false),
        ("/", "/", true),
        ("/a", "/", true),
    ] {
        assert_eq!(is_in(cgroup, asked), expected, "{cgroup} in {asked}");
    }
}

fn now() -> jiff::Timestamp {
    jiff::Timestamp::UNIX_EPOCH
}

#[test]
fn what_is_about_no_connection_passes() {
    let nothing = Filter { pids: vec![1], fates: vec![Final::TimeWait], netns: vec![1], ..Filter::default() };
    assert!(nothing.passes(&Event::Lost(Lost { time: now(), records: 1, since: now() })));
}

#[test]
fn the_programs_leave_what_they_cannot_know() {
    let args =
        parse(&["--pid", "1", "--peer", "::1", "--final", "time_wait", "--min-duration", "1s"]).expect("options");
    let filter = args.on_record().expect("possible");
    assert_eq!(
        filter.clone().beyond_kernel(false),
        Filter { fates: vec![Final::TimeWait], ..Filter::default() },
        "the rest is theirs"
    );
    assert_eq!(filter.beyond_kernel(true).min_us, Some(1_000_000), "with --states they do not know it");
}

const CGROUPS: [&str; 5] = ["/", "/a", "/a/b", "/a/b (deleted)", "/ab"];
const COMMS: [&str; 3] = ["nginx", "go", "a-very-long-nam"];
const IPS: [&str; 8] =
    ["127.0.0.1", "10.0.0.5", "10.255.0.1", "0.0.0.0", "::1", "2001:db8::1", "2001:db9::1", "fe80::1"];
const NETWORKS: [&str; 11] = [
    "127.0.0.0/8",
    "10.0.0.0/8",
    "10.0.0.0/9",
    "10.0.0.5/32",
    "0.0.0.0/0",
    "::/0",
    "::1/128",
    "2001:db8::/32",
    "2001:db8::/31",
    "fe80::/10",
    "::fffe:0:0/95",
];

fn process() -> impl Strategy<Value = Option<Arc<Process>>> {
    let cgroup = proptest::option::of(select(&CGROUPS[..]));
    let some = (1..4_u32, select(&COMMS[..]), cgroup).prop_map(|(pid, comm, cgroup)| Process {
        pid,
        comm: comm.to_owned(),
        exe: None,
        uid: 0,
        cgroup: cgroup.map(str::to_owned),
        container: None,
        source: Source::Read,
    });
    proptest::option::of(some.prop_map(Arc::new))
}

fn end() -> impl Strategy<Value = SocketAddr> {
    (select(&IPS[..]), select(&[80_u16, 443, 8080][..]))
        .prop_map(|(ip, port)| SocketAddr::new(ip.parse().expect("an address"), port))
}

fn any_value<T: ValueEnum + std::fmt::Debug + 'static>() -> impl Strategy<Value = T> {
    select(T::value_variants())
}

fn close() -> impl Strategy<Value = Close> {
    let ends = (end(), end(), 1..4_u32);
    let ending = (any_value::<Cause>(), any_value::<ClosedBy>(), any_value::<Final>());
    (ends, process(), process(), ending, select(&[0_u64, 999_999, 1_000_000, 5_000_000][..])).prop_map(
        |((local, remote, netns), process, closer, (cause, closed_by, fate), duration_us)| Close {
            time: now(),
            cookie: 1,
            netns,
            family: Family::Ipv4,
            local,
            remote,
            role: Role::Unknown,
            process,
            closed_by,
            closer,
            how: None,
            fate: Some(fate),
            fate_source: None,
            states: Vec::new(),
            duration_us,
            started_before: false,
            idle_us: None,
            rx_bytes: 0,
            tx_bytes: 0,
            protocol: Protocol::None,
            http: None,
            cause,
        },
    )
}

/// A `close`, a `close_wait` or a `state`.
fn event() -> impl Strategy<Value = Event> {
    (close(), 0..4).prop_map(|(close, kind)| match kind {
        0 => Event::CloseWait(Box::new(Close { fate: None, ..close })),
        1 => Event::State(Box::new(State {
            time: now(),
            cookie: 1,
            netns: close.netns,
            local: close.local,
            remote: close.remote,
            role: close.role,
            process: close.process,
            old: TcpState::Established,
            new: TcpState::CloseWait,
            delta_us: None,
            closed_by: close.closed_by,
            http: None,
        })),
        _ => Event::Close(Box::new(close)),
    })
}

/// A few filters, each with a few values.
fn args() -> impl Strategy<Value = Vec<String>> {
    fn some<T: ToString>(
        option: &'static str,
        values: &[T],
        most: usize,
    ) -> impl Strategy<Value = Vec<String>> + use<T> {
        let all: Vec<String> = values.iter().map(ToString::to_string).collect();
        // Most often none, so that events pass at all.
        let chosen = subsequence(all, 0..=most);
        (chosen, 0..4).prop_map(move |(chosen, on)| {
            let chosen = if on == 0 { chosen } else { Vec::new() };
            chosen.into_iter().flat_map(|value| [format!("--{option}"), value]).collect()
        })
    }
    let causes: Vec<String> = Cause::value_variants().iter().map(word).collect();
    let ends: Vec<String> = ClosedBy::value_variants().iter().map(word).collect();
    let fates: Vec<String> = Final::value_variants().iter().map(word).collect();
    (
        (some("pid", &[1, 2, 3], 2), some("comm", &COMMS, 2), some("cgroup", &["/", "/a", "/a/b", "/c"], 2)),
        (some("port", &[80, 443, 9], 2), some("peer", &NETWORKS, 4), some("local", &NETWORKS, 4)),
        (some("netns", &[1, 2, 3], 2), some("min-duration", &["1s", "5s"], 1)),
        (some("cause", &causes, 12), some("closed-by", &ends, 3), some("final", &fates, 4)),
    )
        .prop_map(|((a, b, c), (d, e, f), (g, h), (i, j, k))| [a, b, c, d, e, f, g, h, i, j, k].concat())
}

/// The first bits of an address, as text: what is compared with what begins with what. Each family has its own letter.
fn bits(ip: &str) -> String {
    match ip.parse().expect("an address") {
        IpAddr::V4(ip) => format!("4{:032b}", u32::from(ip)),
        IpAddr::V6(ip) => format!("6{:0128b}", u128::from(ip)),
    }
}

fn naively_in(network: &str, end: &Value) -> bool {
    let (address, len) = network.split_once('/').expect("a network");
    let len: usize = len.parse().expect("a number");
    let (ip, _) = end.as_str().and_then(|end| end.rsplit_once(':')).expect("an end");
    bits(ip.trim_matches(['[', ']'])).starts_with(&bits(address)[..=len])
}

/// The same, from the printed event and the words of the command line.
fn naively_passes(event: &Value, args: &[String]) -> bool {
    let processes = [&event["process"], &event["closer"]];
    let ends = [&event["local"], &event["remote"]];
    let is_close = event["type"] == "close";
    let is_state = event["type"] == "state";
    let fits = |option: &str, value: &str| match option {
        "--pid" => processes.iter().any(|process| process["pid"].as_u64() == value.parse().ok()),
        "--comm" => processes.iter().any(|process| process["comm"] == value),
        "--cgroup" => processes.iter().filter_map(|process| process["cgroup"].as_str()).any(|cgroup| {
            let cgroup = cgroup.trim_end_matches(" (deleted)");
            let mut above = Path::new(cgroup).ancestors();
            above.any(|above| above == Path::new(value))
        }),
        "--port" => ends.iter().any(|end| end.as_str().is_some_and(|end| end.ends_with(&format!(":{value}")))),
        "--peer" => naively_in(value, &event["remote"]),
        "--local" => naively_in(value, &event["local"]),
        "--netns" => event["netns"].as_u64() == value.parse().ok(),
        "--min-duration" => {
            let seconds: u64 = value.trim_end_matches('s').parse().expect("seconds");
            !is_close || event["duration_us"].as_u64() >= Some(seconds * 1_000_000)
        }
        "--cause" => is_state || event["cause"] == value,
        "--closed-by" => is_state || event["closed_by"] == value,
        "--final" => is_state || event["final"] == value,
        other => panic!("{other}"),
    };
    let pairs: Vec<_> = args.chunks(2).map(|pair| (pair[0].as_str(), pair[1].as_str())).collect();
    pairs.iter().all(|(option, _)| pairs.iter().any(|(other, value)| other == option && fits(option, value)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_naive_one(event in event(), args in args()) {
        let parsed = parse(&args.iter().map(String::as_str).collect::<Vec<_>>()).expect("well formed");
        let printed = serde_json::to_value(&event).expect("JSON");
        let naive = naively_passes(&printed, &args);
        match parsed.on_record() {
            Ok(filter) => prop_assert_eq!(filter.passes(&event), naive, "{:?} {}", args, printed),
            // The ends of these events are made up: those that cannot be may have been asked for. Of what can be, none is
            // refused, see `how_any_record_ended_can_be_asked_for`.
            Err(refusal) => prop_assert_eq!(refusal.code, 2),
        }
    }

    /// What the programs' map answers is what the predicate does.
    #[test]
    fn the_longest_prefix_decides(networks in subsequence(&NETWORKS[..], 1..5), ip in any_ip()) {
        let networks: Vec<IpNet> = networks.iter().map(|text| network(text).expect("a network")).collect();
        let address = match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let starts = |(len, prefix, _): &(u32, [u8; 16], bool)| {
            bits(&address.to_string()).starts_with(&bits(&Ipv6Addr::from(*prefix).to_string())[..=*len as usize])
        };
        let entries = prefixes(&networks);
        // Of equal keys the map keeps the last.
        let found = entries.iter().filter(|entry| starts(entry)).max_by_key(|(len, ..)| *len);
        let wanted = networks.iter().any(|network| network.contains(&ip));
        prop_assert_eq!(found.is_some_and(|(.., is_wanted)| *is_wanted), wanted, "{:?} {}", networks, ip);
    }
}

/// Those of the table, and any.
fn any_ip() -> impl Strategy<Value = IpAddr> {
    let canonical = |bits: u128| IpAddr::V6(Ipv6Addr::from(bits)).to_canonical();
    prop_oneof![
        select(&IPS[..]).prop_map(|ip| ip.parse().expect("an address")),
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from(bits))),
        any::<u128>().prop_map(canonical),
    ]
}
