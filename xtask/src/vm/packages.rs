//! Debian packages for the guests: kernels of several releases, and the programs that the tests drive.
//!
//! apt itself fetches and verifies them, from the mirrors that this machine uses, into directories of its own under
//! `target/vm`: nothing is installed here. What was unpacked is used again; without its directory, it is fetched anew.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::workspace::{find, output, succeed};

/// An archive of Debian's, by the label of its index.
#[derive(Clone, Copy)]
pub(crate) enum Archive {
    Main,
    Security,
}

impl Archive {
    const fn label(self) -> &'static str {
        match self {
            Self::Main => "Debian",
            Self::Security => "Debian-Security",
        }
    }

    /// Where this machine gets it from.
    fn mirror(self) -> Result<String> {
        let label = self.label();
        let targets = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(SITE)",
            "Created-By: Packages",
            &format!("Label: {label}"),
        ]))?;
        let mirror = targets.lines().next();
        Ok(mirror
            .with_context(|| format!("apt on this machine knows no archive {label}: the VMs need Debian's"))?
            .to_owned())
    }
}

/// apt for one suite, apart from this machine's own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path, sources: &[(Archive, &str)]) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "state"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let d = directory.display();
        let config = format!(
            "Dir::Etc::SourceList \"{d}/sources.list\";\nDir::Etc::SourceParts \"/dev/null\";\nDir::State \"{d}/state\";\n\
             Dir::State::Lists \"{d}/lists\";\nDir::State::status \"{d}/status\";\nDir::Cache \"{d}/cache\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures \"amd64\";\nAPT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
             Acquire::Retries \"3\";\nAPT::Update::Error-Mode \"any\";\n"
        );
        let mut list = String::new();
        for (archive, suite) in sources {
            let mirror = archive.mirror()?;
            list += &format!("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main\n");
        }
        fs::write(directory.join("apt.conf"), config)?;
        fs::write(directory.join("sources.list"), &list)?;
        // Nothing is installed, as far as this apt knows.
        fs::write(directory.join("status"), "")?;
        let apt = Self { directory: directory.to_owned() };
        // Without the mode above, apt takes a mirror that does not answer for a warning, and goes on with no packages.
        succeed(apt.command("apt-get").args(["--quiet=2", "update"])).with_context(|| {
            format!(
                "apt cannot fetch what the VMs need, see above; `apt-get update` on this machine must reach the same mirror, \
                 and the mirror must have these suites:\n{list}"
            )
        })?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf")).env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Unpacks what `download` has left in the cache, and forgets the packages.
    fn unpack(&self, into: &Path) -> Result<()> {
        let archives = self.directory.join("cache/archives");
        for entry in fs::read_dir(&archives)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                succeed(Command::new("dpkg-deb").arg("--extract").args([path.as_path(), into]))?;
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// A kernel that was unpacked.
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// The directory of its modules, whose name is the kernel's release.
    pub(crate) modules: PathBuf,
}

/// Debian's newest `version` for clouds in a suite.
pub(crate) fn kernel(directory: &Path, version: &str, archive: Archive, suite: &str) -> Result<Kernel> {
    let tree = directory.join("tree");
    if let Ok(kernel) = unpacked(&tree)
        && kernel.modules.join("modules.dep").exists()
    {
        return Ok(kernel);
    }
    eprintln!("xtask: fetching kernel {version} of {suite}");
    let apt = Apt::new(&directory.join("apt"), &[(archive, suite)])?;
    let release = newest(&apt, version).with_context(|| {
        format!("{suite} has no kernel {version} any more: `KERNELS` in xtask/src/vm/mod.rs wants to name what it has")
    })?;
    // Since 7.2 the image and the modules have packages of their own.
    let names = apt.command("apt-cache").args(["pkgnames", "linux-"]).output()?.stdout;
    let names = String::from_utf8_lossy(&names).into_owned();
    let wanted: Vec<_> = ["image", "binary", "modules"]
        .iter()
        .map(|part| format!("linux-{part}-{release}"))
        .filter(|name| names.lines().any(|known| known == name))
        .collect();
    let archives = apt.directory.join("cache/archives");
    succeed(apt.command("apt-get").current_dir(archives).args(["--quiet=2", "download"]).args(wanted))?;
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fs::create_dir(&tree)?;
    apt.unpack(&tree)?;
    let kernel = unpacked(&tree)?;
    // What module needs which is not in the package: its installation finds out.
    let name = kernel.modules.file_name().context("it has a name")?;
    let base = if kernel.modules.starts_with(tree.join("usr")) { tree.join("usr") } else { tree };
    output(Command::new(find("depmod").context("depmod is missing")?).arg("--basedir").arg(base).arg(name))?;
    Ok(kernel)
}

/// `uname -r` of the newest kernel of this version.
fn newest(apt: &Apt, version: &str) -> Option<String> {
    let names = apt.command("apt-cache").args(["pkgnames", &format!("linux-image-{version}.")]).output().ok()?.stdout;
    String::from_utf8_lossy(&names)
        .lines()
        .filter_map(|name| name.strip_prefix("linux-image-"))
        // Not one that was carried back to an older Debian.
        .filter(|release| release.ends_with("-cloud-amd64") && !release.contains("-0.deb"))
        .max_by_key(|release| {
            let numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u64>().ok());
            numbers.collect::<Vec<_>>()
        })
        .map(str::to_owned)
}

fn unpacked(tree: &Path) -> Result<Kernel> {
    for modules in ["lib/modules", "usr/lib/modules"] {
        let Some(modules) = only_entry(&tree.join(modules)) else { continue };
        let release = modules.file_name().context("it has a name")?.to_string_lossy().into_owned();
        for image in [modules.join("vmlinuz"), tree.join("boot").join(format!("vmlinuz-{release}"))] {
            if image.exists() {
                return Ok(Kernel { image, modules });
            }
        }
    }
    bail!("no kernel in {}", tree.display());
}

fn only_entry(directory: &Path) -> Option<PathBuf> {
    Some(fs::read_dir(directory).ok()?.next()?.ok()?.path())
}

/// What a guest runs, as Debian's packages; what they need comes with them.
const PROGRAMS: [&str; 27] = [
    "apache2-bin",
    "apache2-utils",
    "base-files",
    "bash",
    "bpftool",
    "coreutils",
    "curl",
    "dash",
    "findutils",
    "gawk",
    "grep",
    "hostname",
    "iproute2",
    "kmod",
    "libc-bin",
    "media-types",
    "mount",
    "netbase",
    "nftables",
    "nginx",
    "nodejs",
    "openssl",
    "procps",
    "python3",
    "sed",
    "systemd",
    "util-linux",
];

/// The root file system of the guests, of the release of Debian that this machine has: what is built here runs there.
pub(crate) fn root(directory: &Path) -> Result<PathBuf> {
    let image = directory.join("root.ext4");
    let made_of = directory.join("root.packages");
    if image.exists() && fs::read_to_string(&made_of).is_ok_and(|packages| packages == PROGRAMS.join(" ")) {
        return Ok(image);
    }
    let about = fs::read_to_string("/etc/os-release")?;
    let release =
        about.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).context("not a release of Debian")?;
    eprintln!("xtask: making a root file system of {release}");
    let security = format!("{release}-security");
    let apt = Apt::new(&directory.join("apt"), &[(Archive::Main, release), (Archive::Security, &security)])?;
    succeed(
        apt.command("apt-get")
            .args(["--quiet=2", "--yes", "--no-install-recommends", "--download-only", "install"])
            .args(PROGRAMS),
    )?;
    let tree = directory.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fs::create_dir(&tree)?;
    apt.unpack(&tree)?;
    // Newer packages have everything in /usr.
    for at in ["bin", "sbin", "lib", "lib64"] {
        if !tree.join(at).exists() {
            symlink(format!("usr/{at}"), tree.join(at))?;
        }
    }
    for at in ["dev", "etc", "payload", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(at))?;
    }
    // What the installation of packages would have made.
    for (file, text) in [
        (
            "passwd",
            "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33::/:/bin/false\nnobody:x:65534:65534::/:/bin/false\n",
        ),
        ("group", "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n"),
        ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
    ] {
        fs::write(tree.join("etc").join(file), text)?;
    }
    image_of(&tree, &image)?;
    fs::remove_dir_all(&tree)?;
    fs::write(made_of, PROGRAMS.join(" "))?;
    Ok(image)
}

/// Makes an ext4 image of a directory, with room to write.
pub(crate) fn image_of(tree: &Path, image: &Path) -> Result<()> {
    let kib: u64 = output(Command::new("du").args(["--summarize", "--block-size=1K"]).arg(tree))?
        .split_whitespace()
        .next()
        .context("du prints a size")?
        .parse()?;
    fs::File::create(image)?.set_len((kib + kib / 5 + (256 << 10)) << 10)?;
    let mke2fs = find("mke2fs").context("mke2fs is missing")?;
    let options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d"];
    succeed(Command::new(mke2fs).args(options).args([tree, image]))
}
