//! One guest: boots a kernel under qemu, with what it shall run on a disk, and reads what that says.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::packages::{Kernel, image_of};
use crate::workspace::{find, succeed};

/// What is needed to see the disks.
const DISKS: [&str; 2] = ["virtio_pci", "virtio_blk"];

/// What goes into every guest.
pub(crate) struct Payload {
    pub(crate) tracer: PathBuf,
    pub(crate) tests: PathBuf,
    /// The directory of the Go programs.
    pub(crate) go: PathBuf,
    /// Names of the tests; none: no tests.
    pub(crate) tests_asked: Option<String>,
    /// Likewise of those that change the whole machine, and so run alone, after the others.
    pub(crate) machine_tests_asked: Option<String>,
}

/// What a guest said.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) release: Option<String>,
    /// Exit codes of tracer, and how many connections of the demo it explained.
    pub(crate) loads: Vec<(i32, u32)>,
    /// Verified instructions of each program; the larger number, where it was loaded more than once.
    pub(crate) verified: Vec<(String, u32)>,
    /// What tracer said beside that.
    pub(crate) messages: Vec<String>,
    /// Exit code of the tests.
    pub(crate) tests: Option<i32>,
    pub(crate) passed: Vec<String>,
    pub(crate) failed: Vec<String>,
    /// What tests passed over, and for want of what. They count as passed, too: the tests fail by themselves where the kernel
    /// is new enough.
    pub(crate) skipped: Vec<String>,
    /// It hung or crashed in the emulator, see [`is_stuck`]: the tests without a result say nothing of tracer.
    pub(crate) stuck: bool,
    /// How many boots this is of.
    pub(crate) boots: usize,
}

/// Boots a kernel and runs the payload on it; what the tests print is passed on. `boot`: which one it is of this kernel,
/// from 1; the consoles of all are kept until the next run.
pub(crate) fn run(
    directory: &Path,
    kernel: &Kernel,
    cpu: &str,
    root: &Path,
    payload: &Payload,
    limit: Duration,
    boot: usize,
) -> Result<Report> {
    let initramfs = initramfs(directory, kernel)?;
    let disk = disk(directory, kernel, payload)?;
    let console = console(directory, boot)?;
    let drive = |image: &Path, name: &str| {
        [
            "-drive".to_owned(),
            format!("file={},format=raw,if=none,id={name},snapshot=on", image.display()),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={name}"),
        ]
    };
    let mut qemu = Command::new("setpriv");
    // It ends with this process, however that ends.
    qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "4096", "-cpu", cpu])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-append", "console=ttyS0 panic=-1 loglevel=5"])
        .args(drive(root, "root"))
        .args(drive(&disk, "payload"))
        .args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let guest = Guest(qemu.spawn().context("cannot run qemu")?);
    let report =
        listen(guest, limit, &console).with_context(|| format!("the guest's console is in {}", console.display()));
    fs::remove_file(disk)?;
    report
}

/// Where this boot's console goes to. With the first boot those of an earlier run are removed.
fn console(directory: &Path, boot: usize) -> Result<PathBuf> {
    const CONSOLE: &str = "console";
    if boot == 1 {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|name| name.split('.').next() == Some(CONSOLE)) {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(directory.join(format!("{CONSOLE}.{boot}")))
}

/// Whether a kernel hangs, or has crashed, because it patches its own code, and qemu goes on with what that was: the trap (`int3`)
/// that guards the place meanwhile. A processor that comes there is caught for good, or finds that nobody knows of that trap. It is
/// told by what the kernel complains of; one complaint of a hang may be but a host that is busy.
fn is_stuck(console: &str) -> bool {
    (console.matches("BUG: soft lockup").count() > 2 && console.contains("int3"))
        || (console.contains("int3: 0000 [#") && console.contains("Kernel panic"))
}

/// A running qemu, ended when it goes out of scope.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn listen(mut guest: Guest, limit: Duration, console: &Path) -> Result<Report> {
    /// With nothing said for so long it is looked at: at what its kernel has complained of since.
    const SILENCE: Duration = Duration::from_secs(60);
    let stdout = BufReader::new(guest.0.stdout.take().context("it is piped")?);
    let (said, lines) = channel();
    std::thread::spawn(move || {
        for line in stdout.split(b'\n').map_while(Result::ok) {
            if said.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + limit;
    let mut report = Report { boots: 1, ..Report::default() };
    let mut complained = 0;
    loop {
        let complaints =
            || -> Result<String> { Ok(String::from_utf8_lossy(&fs::read(console)?[complained..]).into_owned()) };
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(SILENCE)) {
            Ok(line) if line == "@end" => return Ok(report),
            Ok(line) => {
                report.read(&line);
                complained = fs::metadata(console)?.len() as usize;
            }
            Err(RecvTimeoutError::Disconnected) => {
                report.stuck = is_stuck(&complaints()?);
                return Ok(report);
            }
            Err(RecvTimeoutError::Timeout) if left <= SILENCE => {
                eprintln!("xtask: the guest did not end within {limit:?}");
                return Ok(report);
            }
            Err(RecvTimeoutError::Timeout) if is_stuck(&complaints()?) => {
                report.stuck = true;
                return Ok(report);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

impl Report {
    /// Whether a test has a result.
    pub(crate) fn has(&self, test: &str) -> bool {
        self.passed.iter().chain(&self.failed).any(|known| known == test)
    }

    /// With what another boot said of the same kernel: of tests that had no result, or of all where the demo had none.
    pub(crate) fn joined_by(mut self, other: Self) -> Self {
        self.release = self.release.or(other.release.clone());
        self.loads = if other.loads.len() > self.loads.len() { other.loads } else { self.loads };
        self.tests = self.tests.filter(|code| *code != 0).or(other.tests).or(self.tests);
        other.verified.into_iter().for_each(|(name, count)| self.verified(name, count));
        self.passed.extend(other.passed);
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
        self.messages.extend(other.messages);
        // One that did not boot says no more than one that hung.
        Self { stuck: other.stuck || other.release.is_none(), boots: self.boots + other.boots, ..self }
    }

    fn verified(&mut self, name: String, count: u32) {
        match self.verified.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = count.max(*known),
            None => self.verified.push((name, count)),
        }
    }

    fn read(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        let number = |word: &str| word.parse().unwrap_or(-1);
        match words.as_slice() {
            ["@kernel", release] => self.release = Some((*release).to_owned()),
            ["@load", code, explained] => self.loads.push((number(code), explained.parse().unwrap_or(0))),
            // Of those that run alone, too: the first that is not 0.
            ["@tests", code] => self.tests = self.tests.filter(|code| *code != 0).or(Some(number(code))),
            ["tracer:", "program", name, count, "verified", "instructions"] => {
                self.verified(name.trim_end_matches(':').to_owned(), count.parse().unwrap_or(0));
            }
            ["skipped:", ..] => {
                self.skipped.push(line.to_owned());
                println!("{line}");
            }
            ["tracer:", ..] => self.messages.push(line.to_owned()),
            ["test", name, "...", result] => {
                match *result {
                    "ok" => self.passed.push((*name).to_owned()),
                    _ => self.failed.push((*name).to_owned()),
                }
                println!("{line}");
            }
            _ => println!("{line}"),
        }
    }
}

/// The first file system: what finds the disks.
fn initramfs(directory: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let tree = directory.join("initramfs");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    for at in ["dev", "modules", "new"] {
        fs::create_dir_all(tree.join(at))?;
    }
    fs::copy(find("busybox").context("busybox is missing")?, tree.join("busybox"))?;
    let init = tree.join("init");
    fs::write(&init, include_str!("initramfs.sh"))?;
    executable(&init)?;
    let mut order = Vec::new();
    let dependencies = fs::read_to_string(kernel.modules.join("modules.dep"))?;
    for module in DISKS {
        with_dependencies(&dependencies, module, &mut order);
    }
    let mut names = String::new();
    for path in &order {
        let plain = path.rsplit('/').next().context("a path has a name")?.trim_end_matches(".xz");
        let module = Command::new(if path.ends_with(".xz") { "xzcat" } else { "cat" })
            .arg(kernel.modules.join(path))
            .output()?;
        if !module.status.success() {
            bail!("cannot read {path}");
        }
        fs::write(tree.join("modules").join(plain), module.stdout)?;
        names += plain;
        names.push('\n');
    }
    fs::write(tree.join("modules/order"), names)?;
    let archive = directory.join("initramfs.cpio");
    let pack = "find . | busybox cpio -o -H newc >\"$0\" 2>/dev/null";
    succeed(Command::new("sh").args(["-ec", pack]).arg(&archive).current_dir(&tree))?;
    fs::remove_dir_all(tree)?;
    Ok(archive)
}

/// The paths of a module and of what it needs, in the order in which they must be loaded; none if it is built in.
fn with_dependencies(dependencies: &str, module: &str, order: &mut Vec<String>) {
    let is_it = |path: &str| path.rsplit('/').next().is_some_and(|file| file.split('.').next() == Some(module));
    let Some((path, needs)) =
        dependencies.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| is_it(path))
    else {
        return;
    };
    // What is needed by others is listed last.
    for path in needs.split_whitespace().rev().chain([path]) {
        if !order.iter().any(|known| known == path) {
            order.push(path.to_owned());
        }
    }
}

/// The disk with all that the guest shall run.
fn disk(directory: &Path, kernel: &Kernel, payload: &Payload) -> Result<PathBuf> {
    let tree = directory.join("payload");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fs::create_dir_all(tree.join("modules"))?;
    let copy = |from: &Path, to: &str| {
        succeed(Command::new("cp").args(["--recursive", "--no-target-directory"]).arg(from).arg(tree.join(to)))
    };
    copy(
        &kernel.modules,
        &format!("modules/{}", kernel.modules.file_name().context("it has a name")?.to_string_lossy()),
    )?;
    copy(&payload.go, "go")?;
    for (program, name) in [(&payload.tracer, "tracer"), (&payload.tests, "kernel-tests")] {
        // Their debug information would be most of the disk.
        succeed(Command::new("objcopy").arg("--strip-debug").arg(program).arg(tree.join(name)))?;
    }
    let script = tree.join("guest.sh");
    fs::write(&script, include_str!("guest.sh"))?;
    executable(&script)?;
    let mut settings = format!("TRACER='{}'\n", payload.tracer.display());
    for (variable, names) in [("TESTS", &payload.tests_asked), ("MACHINE_TESTS", &payload.machine_tests_asked)] {
        if let Some(names) = names {
            settings += &format!("{variable}='{names}'\n");
        }
    }
    fs::write(tree.join("settings"), settings)?;
    let image = directory.join("payload.ext4");
    image_of(&tree, &image)?;
    fs::remove_dir_all(tree)?;
    Ok(image)
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_behind_what_they_need() {
        let dependencies = "kernel/a/virtio.ko.xz:\nkernel/b/virtio_ring.ko.xz: kernel/a/virtio.ko.xz\n\
            kernel/c/virtio_blk.ko.xz: kernel/b/virtio_ring.ko.xz kernel/a/virtio.ko.xz\n";
        let mut order = Vec::new();
        with_dependencies(dependencies, "virtio_pci", &mut order);
        with_dependencies(dependencies, "virtio_blk", &mut order);
        assert_eq!(order, ["kernel/a/virtio.ko.xz", "kernel/b/virtio_ring.ko.xz", "kernel/c/virtio_blk.ko.xz"]);
    }

    #[test]
    fn the_consoles_of_all_boots_are_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let boot = |n, text: &str| fs::write(console(directory.path(), n).expect("a place"), text).expect("written");
        let names = || -> Vec<_> {
            let mut names: Vec<_> = fs::read_dir(directory.path())
                .expect("it is there")
                .map(|entry| entry.expect("one").file_name())
                .collect();
            names.sort();
            names
        };
        fs::write(directory.path().join("payload.ext4"), "").expect("written");
        boot(1, "first");
        boot(2, "second");
        assert_eq!(names(), ["console.1", "console.2", "payload.ext4"]);
        boot(1, "of the next run");
        assert_eq!(names(), ["console.1", "payload.ext4"]);
    }

    #[test]
    fn reads_what_a_guest_says() {
        let mut report = Report::default();
        for line in [
            "@kernel 6.1.0",
            "tracer: program ingress: 7 verified instructions",
            "tracer: program ingress: 5 verified instructions",
            "@load 0 3",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "skipped: a::b: this kernel, 6.1.0, lacks x (Linux 6.2)",
            "@tests 101",
        ] {
            report.read(line);
        }
        assert_eq!(report.release.as_deref(), Some("6.1.0"));
        assert_eq!(report.verified, [("ingress".to_owned(), 7)]);
        assert_eq!(
            (&report.loads[..], report.tests, &report.passed[..]),
            (&[(0, 3)][..], Some(101), &["a::b".to_owned()][..])
        );
        assert_eq!((&report.failed[..], report.skipped.len()), (&["a::c".to_owned()][..], 1));
        assert!(report.has("a::b") && report.has("a::c") && !report.has("a::d"));
        let mut other = Report::default();
        for line in ["@kernel 6.1.0", "@load 0 3", "test a::d ... ok", "@tests 0"] {
            other.read(line);
        }
        let all = report.joined_by(other);
        assert_eq!((all.loads.len(), all.tests, all.passed.len(), all.failed.len()), (1, Some(101), 2, 1));

        // It hung in the demo, then behind the last test.
        let mut first = Report { stuck: true, ..Report::default() };
        first.read("@kernel 6.1.0");
        let mut second = Report { stuck: true, ..Report::default() };
        for line in
            ["@kernel 6.1.0", "@load 0 3", "@load 0 3", "tracer: program ingress: 7 verified instructions", "@tests 0"]
        {
            second.read(line);
        }
        let all = first.joined_by(second).joined_by(Report::default());
        assert_eq!((all.loads.len(), all.tests, all.verified.len(), all.stuck), (2, Some(0), 1, true));
    }

    #[test]
    fn what_the_emulator_does_is_told_from_what_a_kernel_does() {
        let lockup = "[  1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 44s! [tracer:428]\n";
        let trap = "[  1.0] RIP: 0010:asm_exc_int3+0x0/0x40\n";
        assert!(is_stuck(&[lockup, lockup, trap, lockup].concat()));
        let panic = "[  1.1] Kernel panic - not syncing: Fatal exception in interrupt\n";
        // As of 6.1, and of 6.12.
        assert!(is_stuck(&["[  1.0] int3: 0000 [#1] PREEMPT SMP\n", panic].concat()));
        assert!(is_stuck(&["[  1.0] Oops: int3: 0000 [#1] PREEMPT\n", panic].concat()));
        // Crashed of something else.
        assert!(!is_stuck(&["[  1.0] BUG: kernel NULL pointer dereference\n", panic].concat()));
        // Busy, or hung in something else.
        assert!(!is_stuck(&[lockup, trap].concat()));
        assert!(!is_stuck(&[lockup; 9].concat()));
    }
}
