//! How far the clocks of this process are from the host's: a time namespace shifts `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME`.
//!
//! The kernel programs know the host's clocks only; this process sees those of its namespace, and so does `/proc`, when it
//! tells when a process started. What comes in: `/proc/self/timens_offsets`. What goes out: two shifts, read once and before
//! this process confines itself. A namespace's shifts never change once a process is in it. Nothing here fails: a kernel
//! without time namespaces has no shifts, and where they cannot be read they are taken for none; [`is_known`] says so.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::OnceLock;

use tracer_ebpf::TICK_NS;

/// Nanoseconds that this process's clocks are ahead of the host's; negative: behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shifts {
    /// Of `CLOCK_MONOTONIC`.
    pub(crate) monotonic_ns: i64,
    /// Of `CLOCK_BOOTTIME`.
    pub(crate) boottime_ns: i64,
}

/// The shifts of this process.
pub(crate) fn shifts() -> Shifts {
    static SHIFTS: OnceLock<Shifts> = OnceLock::new();
    *SHIFTS.get_or_init(|| of_this_namespace().map(|text| parse(&text)).unwrap_or_default())
}

/// `/proc/self/timens_offsets`, if it is about the namespace that this process is in.
fn of_this_namespace() -> Option<String> {
    (namespace() == Namespace::Shifted).then(|| fs::read_to_string("/proc/self/timens_offsets").ok()).flatten()
}

/// Whether the shifts of this process are known. They are not where it is in another namespace than its children are to be in:
/// only the shifts of the latter can be read. Kernels that enter it with `exec` leave no process that way when it starts.
pub(crate) fn is_known() -> bool {
    namespace() != Namespace::Unreadable
}

/// Which time namespace this process is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Namespace {
    /// The host's, or this kernel has no others.
    Host,
    /// Another one, whose shifts can be read.
    Shifted,
    /// Another one, whose shifts cannot.
    Unreadable,
}

fn namespace() -> Namespace {
    let inode = |name: &str| Some(fs::metadata(format!("/proc/self/ns/{name}")).ok()?.ino());
    judge(inode("time"), inode("time_for_children"))
}

/// From the inodes of the namespaces of a process, and of its children to come.
fn judge(own: Option<u64>, children: Option<u64>) -> Namespace {
    /// `PROC_TIME_INIT_INO`, `include/linux/proc_ns.h`
    const HOST: u64 = 0xEFFF_FFFA;
    match own {
        None | Some(HOST) => Namespace::Host,
        _ if own == children => Namespace::Shifted,
        _ => Namespace::Unreadable,
    }
}

/// A start that the kernel told, in nanoseconds since boot, as this process's `/proc/<pid>/stat` shows it: clock ticks.
pub(crate) fn seen_ticks(start_ns: u64) -> u64 {
    shifts().seen_ticks(start_ns)
}

/// The other way round. Exact where the shift is a whole number of ticks, as it is where nobody set fractions of a second, and the
/// process has not started before the time at which the namespace's clock begins; else it may be one tick too little, and the kernel
/// programs take it as if it were not.
pub(crate) fn host_ticks(seen: u64) -> u64 {
    shifts().host_ticks(seen)
}

impl Shifts {
    /// A start before the namespace's clock begins wraps, as it does in the kernel (`do_task_stat`, `fs/proc/array.c`).
    pub(crate) fn seen_ticks(self, start_ns: u64) -> u64 {
        start_ns.wrapping_add_signed(self.boottime_ns) / TICK_NS
    }

    pub(crate) fn host_ticks(self, seen: u64) -> u64 {
        seen.wrapping_mul(TICK_NS).wrapping_add_signed(self.boottime_ns.wrapping_neg()) / TICK_NS
    }
}

/// Lines such as `monotonic      -86400      500000000`: seconds, nanoseconds (which count up).
pub(crate) fn parse(text: &str) -> Shifts {
    let shift = |clock: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(clock))?;
        let mut numbers = line.split_whitespace().map(str::parse::<i64>);
        let (seconds, ns) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        seconds.checked_mul(1_000_000_000)?.checked_add(ns)
    };
    Shifts { monotonic_ns: shift("monotonic").unwrap_or(0), boottime_ns: shift("boottime").unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_of_either_sign() {
        let text = "monotonic      100000         5\nboottime           -2 500000000\n";
        assert_eq!(parse(text), Shifts { monotonic_ns: 100_000_000_000_005, boottime_ns: -1_500_000_000 });
        assert_eq!(parse("monotonic           0         0\nboottime            0         0\n"), Shifts::default());
    }

    #[test]
    fn ticks_of_the_namespace_and_of_the_host() {
        let shifts = |seconds: i64| Shifts { monotonic_ns: 0, boottime_ns: seconds * 1_000_000_000 };
        // Seconds since boot, and in the namespace.
        for (start, shift, seen) in [(20, 0, 20), (20, 100, 120), (120, -30, 90)] {
            assert_eq!(shifts(shift).seen_ticks(start * 1_000_000_000), seen * 100);
            assert_eq!(shifts(shift).host_ticks(seen * 100), start * 100);
        }
        // Ten seconds before its clock began.
        assert_eq!(shifts(-30).seen_ticks(20_000_000_000), 1_844_674_406_370);
        assert!([1_999, 2_000].contains(&shifts(-30).host_ticks(1_844_674_406_370)));
    }

    #[test]
    fn only_the_namespace_of_children_can_be_read() {
        const HOST: u64 = 4_026_531_834;
        assert_eq!(judge(None, None), Namespace::Host, "a kernel without, or no /proc");
        assert_eq!(judge(Some(HOST), Some(HOST)), Namespace::Host);
        assert_eq!(judge(Some(HOST), Some(7)), Namespace::Host, "the children's is not this one");
        assert_eq!(judge(Some(7), Some(7)), Namespace::Shifted);
        assert_eq!(judge(Some(7), Some(8)), Namespace::Unreadable);
        assert_eq!(judge(Some(7), Some(HOST)), Namespace::Unreadable);
        assert_eq!(judge(Some(7), None), Namespace::Unreadable);
    }

    #[test]
    fn what_cannot_be_read_is_no_shift() {
        for text in ["", "monotonic\n", "monotonic x 0\n", "monotonic 9223372036854775807 0\n"] {
            assert_eq!(parse(text), Shifts::default(), "{text:?}");
        }
    }
}
