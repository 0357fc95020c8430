//! What changes the whole machine: its clock, its sleep, and as many processes as it bears.
//!
//! Everything else on the machine would notice. So these run only in a guest that is thrown away afterwards, one after the
//! other: `cargo xtask vm`.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use serde_json::{Value, json};

use crate::privileges::{nobody_with, unit_capabilities};
use crate::rig::{
    Listener, PATIENCE, Pair, Tracer, expect, free_port, get, in_a_guest, is_dated, ok, resident_kib, tracer,
};
use crate::script::{self, Script};

/// Fails on a machine that is somebody's: `--ignored` is easily said.
fn only_in_a_guest() {
    assert!(in_a_guest(), "this changes the whole machine: run `cargo xtask vm`");
}

fn seconds(clock: ClockId) -> f64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(clock);
    tv_sec as f64 + tv_nsec as f64 / 1e9
}

/// Sets the clock by so many seconds.
fn set_clock_by(seconds: i64) {
    let now = clock_gettime(ClockId::Realtime);
    clock_settime(ClockId::Realtime, Timespec { tv_sec: now.tv_sec + seconds, ..now }).expect("root may set it");
}

/// The server closes a connection that has had a request: the record of its end, which has the right date.
fn close(tracer: &Tracer, mut pair: Pair) -> Value {
    let since = Timestamp::now();
    pair.request(get("Connection: close\r\n"));
    pair.respond(ok("Connection: close\r\nContent-Length: 0\r\n"));
    let (server, client) = pair.server_closes_first();
    let close = tracer.wait_for_close(server, client);
    expect(&close, &json!({ "cause": "request_close", "final": "time_wait" }));
    is_dated(&close, since);
    close
}

/// How long a connection was open, which had begun by then.
fn lasted(close: &Value, at_most: Duration) {
    let duration = Duration::from_micros(close["duration_us"].as_u64().expect("a number that is not negative"));
    assert!(duration <= at_most + Duration::from_millis(1), "{duration:?} of {at_most:?}: {close:#}");
}

#[test]
#[ignore = "sets the clock of the whole machine"]
fn the_clock_is_set() {
    only_in_a_guest();
    const HOUR: i64 = 3_600;
    let listener = Listener::new();
    // It must last for all that follows, and must not end an hour early, or late.
    let lasts = *PATIENCE / 4;
    let asked = format!("{}s", lasts.as_secs());
    let tracer = Tracer::start(&["--port", &listener.port.to_string(), "--duration", &asked]);
    let began = Instant::now();
    for by in [HOUR, -2 * HOUR, HOUR] {
        let opened = Instant::now();
        let pair = listener.connect();
        set_clock_by(by);
        // What is read together with a record from before the step is dated like that.
        std::thread::sleep(Duration::from_millis(100));
        let close = close(&tracer, pair);
        lasted(&close, opened.elapsed());
    }
    set_clock_by(HOUR);
    let (run, status) = tracer.join();
    let took = began.elapsed();
    set_clock_by(-HOUR);
    assert!(status.success(), "{status}");
    let told = run.summary["duration_s"].as_f64().expect("a number");
    // The start line comes a moment after the beginning.
    assert!(took + Duration::from_secs(5) > lasts && took < lasts + *PATIENCE, "{took:?} of {lasts:?}");
    assert!((told - took.as_secs_f64()).abs() < 30.0, "{told} s and {took:?}");
}

/// It is refused, whether the setting can be read or not.
#[test]
#[ignore = "changes how the whole machine runs BPF programs"]
fn programs_are_not_compiled() {
    only_in_a_guest();
    const SETTING: &str = "/proc/sys/net/core/bpf_jit_enable";
    const REMEDY: &str = "; sysctl -w net.core.bpf_jit_enable=1";
    let directory = tempfile::tempdir().expect("a directory");
    let answers = |command: &mut Command| {
        let output = command.output().expect("it starts");
        (output.status.code(), String::from_utf8(output.stderr).expect("UTF-8"))
    };
    let as_root = || answers(tracer().args(["run", "--duration", "10ms"]));
    // Who is not root may not read it.
    let as_nobody = || answers(nobody_with(&unit_capabilities(), directory.path()).args(["run", "--duration", "10ms"]));
    fs::write(SETTING, "0").expect("Debian's kernels can do without");
    let without = [as_root(), as_nobody()];
    let doctor = answers(tracer().args(["doctor"])).0;
    fs::write(SETTING, "1").expect("they can do with it");
    for (code, said) in without {
        assert!(code == Some(4) && said.contains(REMEDY), "{code:?}: {said}");
    }
    assert_eq!(doctor, Some(4));
    for (code, said) in [as_root(), as_nobody()] {
        assert_eq!(code, Some(0), "{said}");
    }
}

#[test]
#[ignore = "suspends the whole machine"]
fn the_machine_sleeps() {
    only_in_a_guest();
    const ASLEEP: u64 = 5;
    // Just awake, an emulated processor may take seconds for a round trip. Then FINs are sent again, and the RST that answers a
    // second acknowledgement would end the TIME_WAIT within moments, which tracer calls unknown.
    fs::write("/proc/sys/net/ipv4/tcp_rfc1337", "1").expect("the kernel can ignore such a RST");
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let (opened, awake, all) = (Instant::now(), seconds(ClockId::Monotonic), seconds(ClockId::Boottime));
    let pair = listener.connect();
    fs::write("/sys/class/rtc/rtc0/wakealarm", format!("+{ASLEEP}")).expect("it has an alarm clock");
    // An emulated processor does not always find back: they are left out, for good.
    for n in 1.. {
        let Ok(()) = fs::write(format!("/sys/devices/system/cpu/cpu{n}/online"), "0") else { break };
    }
    // To memory: an emulated alarm clock wakes from no other sleep.
    fs::write("/sys/power/mem_sleep", "deep").expect("it can be suspended to memory");
    fs::write("/sys/power/state", "mem").expect("it can be suspended");
    let awake = seconds(ClockId::Monotonic) - awake;
    let asleep = seconds(ClockId::Boottime) - all - awake;
    assert!(asleep > ASLEEP as f64 / 2.0, "it slept for {asleep} s");
    std::thread::sleep(Duration::from_millis(100));
    let close = close(&tracer, pair);
    // This clock stands still meanwhile, too.
    lasted(&close, opened.elapsed());
    eprintln!("asleep for {asleep:.1} s, which are not in {} us", close["duration_us"]);
    tracer.stop();
}

/// Processes that share their memory and files with this one, so that there is room for them; each but waits for a signal.
struct Crowd(Vec<libc::pid_t>);

impl Crowd {
    fn of(count: usize) -> Self {
        extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
            loop {
                // SAFETY: it takes nothing. Not the function of that name, which looks at its thread's memory: there is none.
                unsafe { libc::syscall(libc::SYS_pause) };
            }
        }
        /// Bytes of a stack. All they hold of it are the frames of two functions.
        const STACK: usize = 1024;
        // They outlive the processes: nobody may use them again while those run.
        let stacks: &'static mut [u8] = Box::leak(vec![0u8; (count + 1) * STACK].into_boxed_slice());
        let flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::SIGCHLD;
        let mut crowd = Self(Vec::with_capacity(count));
        for stack in stacks.chunks_exact_mut(STACK).skip(1) {
            let top = stack.as_mut_ptr_range().end.map_addr(|at| at & !15).cast();
            // SAFETY: a stack of its own, aligned as it must be; what runs on it makes a system call and no more.
            let pid = unsafe { libc::clone(wait, top, flags, std::ptr::null_mut()) };
            assert!(pid > 0, "process {} of {count}: {}", crowd.0.len(), std::io::Error::last_os_error());
            crowd.0.push(pid);
        }
        crowd
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for pid in &self.0 {
            // SAFETY: two system calls about our own children.
            unsafe {
                libc::kill(*pid, libc::SIGKILL);
                libc::waitpid(*pid, std::ptr::null_mut(), 0);
            }
        }
    }
}

/// They are there when it starts, and are looked through for the owners of what is open. Ids have more than 16 bits then.
#[test]
#[ignore = "takes all process ids of a usual machine, and two gigabytes"]
fn more_processes_than_65_535() {
    only_in_a_guest();
    const COUNT: usize = 65_535;
    for name in ["pid_max", "threads-max"] {
        fs::write(format!("/proc/sys/kernel/{name}"), "200000").expect("root may set it");
    }
    let port = free_port();
    let began = Instant::now();
    let _crowd = Crowd::of(COUNT);
    let there = began.elapsed();
    // Behind them all: its id is the largest.
    let server = Script::start(
        port,
        "listener = listen(16)\n\
         say('listening')\n\
         held = listener.accept()[0]\n\
         say('held')\n\
         while True:\n\
        \x20    serve(listener.accept()[0])",
    );
    server.expect("listening");
    assert!(server.pid() > COUNT as u32, "{}", server.pid());
    let (held, first) = script::connect(port);
    server.expect("held");
    let began = Instant::now();
    let tracer = Tracer::on_port(port);
    let started = began.elapsed();
    let processes = fs::read_dir("/proc").expect("it is mounted").filter(|entry| {
        let name = entry.as_ref().map(|entry| entry.file_name()).unwrap_or_default();
        name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit())
    });
    let processes = processes.count();
    assert!(processes > COUNT, "{processes} processes");
    let exe = fs::read_link(format!("/proc/{}/exe", server.pid())).expect("it runs").display().to_string();
    let owner = json!({ "pid": server.pid(), "exe": exe });
    // One that was open before, and one that was not.
    let second = script::exchange(port);
    expect(&tracer.wait_for_close(port, second), &json!({ "process": owner, "closed_by": "local" }));
    let kib = resident_kib(tracer.pid());
    eprintln!("{processes} processes, there in {there:?}; tracer started in {started:?}, and takes {kib} KiB");
    assert!(kib < 30_000, "{kib} KiB");
    // Its process ends, and closes what it held.
    drop(held);
    drop(server);
    expect(&tracer.wait_for_close(port, first), &json!({ "process": owner, "started_before": true }));
    tracer.stop();
}
