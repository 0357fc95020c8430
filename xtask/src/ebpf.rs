//! `cargo xtask ebpf [--check]`: compiles the kernel programs into the object that is committed.
//!
//! The object must depend on nothing but the source and the toolchain, so that anyone can rebuild it and compare: paths of
//! the machine are remapped, DWARF is removed (BTF stays), and the toolchain is recorded beside it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use object::build::elf::{Builder, SectionData};

use crate::workspace;

const TARGET: &str = "bpfel-unknown-none";
const BPF_LINKER: &str = "cargo install bpf-linker --version 0.10.3 --locked";
const FLAGS: [&str; 8] =
    ["-C", "linker=bpf-linker", "-C", "link-arg=--btf", "-C", "target-cpu=v3", "-C", "panic=abort"];
/// Set here rather than in `[profile.release]`, which is for the host.
const PROFILE: [(&str, &str); 8] = [
    ("CODEGEN_UNITS", "1"),
    ("DEBUG", "2"),
    ("DEBUG_ASSERTIONS", "false"),
    ("LTO", "fat"),
    ("OPT_LEVEL", "3"),
    ("OVERFLOW_CHECKS", "false"),
    ("PANIC", "abort"),
    ("STRIP", "none"),
];

/// Compiles the programs and replaces the committed object and its record.
pub(crate) fn install() -> Result<()> {
    let toolchain = Toolchain::find(&recorded_tools().unwrap_or_default())?;
    let object = toolchain.build()?;
    let record = format!("{}{}sha256: {}\n", toolchain.tools, flags_line(), sha256(&object)?);
    let (to, beside) = (committed(), record_path());
    fs::copy(&object, &to).with_context(|| format!("cannot write {}", to.display()))?;
    fs::write(&beside, record).with_context(|| format!("cannot write {}", beside.display()))?;
    eprintln!("xtask: wrote {} and {}", to.display(), beside.display());
    Ok(())
}

/// Compiles the programs and compares them with the committed object.
pub(crate) fn check() -> Result<()> {
    const STALE: &str = "run `cargo xtask ebpf` and commit both files";
    let recorded = recorded_tools()?;
    let committed_sum = sha256(&committed())?;
    let record = fs::read_to_string(record_path())?;
    ensure!(
        record.lines().any(|line| line.strip_prefix("sha256: ") == Some(&committed_sum)),
        "{} is not the object that {} describes: {STALE}",
        committed().display(),
        record_path().display()
    );
    let toolchain = Toolchain::find(&recorded)?;
    let object = toolchain.build()?;
    let fresh = bpf_target_dir().join("tracer.bpf.o");
    if toolchain.tools == recorded {
        let _ = fs::remove_file(&fresh);
        ensure!(fs::read(&object)? == fs::read(committed())?, "the committed object is stale: {STALE}");
        eprintln!("xtask: {} is what this source compiles to", committed().display());
    } else {
        fs::copy(&object, &fresh)?;
        eprintln!(
            "xtask: the committed object was made by another toolchain, so that bytes cannot be compared.\n\
             committed:\n{recorded}here:\n{}\
             To build and test tracer with the object made here: TRACER_BPF_OBJECT={}",
            toolchain.tools,
            fresh.display()
        );
    }
    Ok(())
}

/// Lints the programs; says so and does no more where the toolchain for that is missing.
pub(crate) fn clippy() -> Result<()> {
    let toolchain = match Toolchain::find_all() {
        Ok(all) => all.into_iter().find(|toolchain| toolchain.sibling("cargo-clippy").is_file()),
        Err(_) => None,
    };
    let Some(toolchain) = toolchain else {
        eprintln!("xtask: the kernel programs are not linted: no toolchain has both rust-src and clippy");
        return Ok(());
    };
    let mut command = Command::new(toolchain.sibling("cargo-clippy"));
    command.current_dir(workspace::root()).arg("clippy");
    if let Some(cargo) = env::var_os("CARGO") {
        command.env("CARGO", cargo);
    }
    toolchain.configure(&mut command)?;
    workspace::succeed(command.args(["--", "-D", "warnings"]))
}

/// A compiler that has the source of `core`, and the linker.
struct Toolchain {
    rustc: PathBuf,
    sysroot: PathBuf,
    /// The LLVM that `rustc` uses, if it is a shared library.
    llvm: Option<PathBuf>,
    /// Lines of the record that name what made an object.
    tools: String,
}

impl Toolchain {
    /// The toolchain that made the committed object if it is here, otherwise the first one found.
    fn find(recorded: &str) -> Result<Self> {
        let mut all = Self::find_all()?;
        let best = all.iter().position(|toolchain| toolchain.tools == recorded).unwrap_or(0);
        Ok(all.swap_remove(best))
    }

    fn find_all() -> Result<Vec<Self>> {
        let linker = workspace::output(Command::new("bpf-linker").arg("--version"))
            .with_context(|| format!("bpf-linker is missing; install it: {BPF_LINKER}"))?;
        let current = PathBuf::from(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        let mut all = Vec::new();
        for rustc in [current, "/usr/bin/rustc".into()] {
            if let Some(toolchain) = Self::new(&rustc, &linker)? {
                all.push(toolchain);
            }
        }
        ensure!(
            !all.is_empty(),
            "no rustc here has the source of core; install it: `rustup component add rust-src`, \
             or on Debian `apt-get install rustc-web rust-web-src`"
        );
        Ok(all)
    }

    fn new(rustc: &Path, linker: &str) -> Result<Option<Self>> {
        let Ok(sysroot) = workspace::output(Command::new(rustc).args(["--print", "sysroot"])) else {
            return Ok(None);
        };
        let sysroot = PathBuf::from(sysroot);
        if !sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
            return Ok(None);
        }
        // Not what may be rustup's proxy: that one would set the library path to its own toolchain's.
        let rustc = sysroot.join("bin/rustc");
        let verbose = workspace::output(Command::new(&rustc).arg("-vV"))?;
        let version = verbose.lines().next().unwrap_or_default();
        let llvm = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("unknown");
        let cargo = workspace::output(workspace::cargo().arg("--version"))?;
        let tools = format!("compiler: {version}\nllvm: {llvm}\ncargo: {cargo}\nlinker: {linker}\n");
        let llvm = llvm_library(&rustc);
        Ok(Some(Self { rustc, sysroot, llvm, tools }))
    }

    /// Another program of the same toolchain.
    fn sibling(&self, name: &str) -> PathBuf {
        self.sysroot.join("bin").join(name)
    }

    /// Builds the object and returns its path, below the target directory.
    fn build(&self) -> Result<PathBuf> {
        let mut command = workspace::cargo();
        command.arg("build");
        self.configure(&mut command)?;
        workspace::succeed(&mut command)?;
        let linked = bpf_target_dir().join(TARGET).join("release/tracer-ebpf");
        let stripped = linked.with_extension("stripped.o");
        let bytes = fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
        let bytes = without_dwarf(&bytes).context("cannot remove the debug information")?;
        refuse_paths(&bytes)?;
        fs::write(&stripped, bytes)?;
        Ok(stripped)
    }

    /// Completes `cargo build` or `cargo clippy` for the kernel programs.
    fn configure(&self, command: &mut Command) -> Result<()> {
        let target_dir = bpf_target_dir();
        command
            .args(["--release", "--locked", "-Z", "build-std=core", "--target", TARGET])
            .args(["--package", "tracer-ebpf", "--bin", "tracer-ebpf", "--features", "programs", "--target-dir"])
            .arg(&target_dir)
            .env("RUSTC", &self.rustc)
            // `-Z build-std` on a stable toolchain.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags().join("\x1f"))
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("CARGO_INCREMENTAL")
            .env_remove("CARGO_BUILD_TARGET")
            .env_remove("RUSTUP_TOOLCHAIN");
        for (name, value) in PROFILE {
            command.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
        }
        // bpf-linker loads the first libLLVM that it finds along the library path. Let it find the compiler's.
        if let Some(llvm) = &self.llvm {
            let directory = target_dir.join("llvm");
            let _ = fs::remove_dir_all(&directory);
            fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
            std::os::unix::fs::symlink(llvm, directory.join(llvm.file_name().unwrap_or_default()))?;
            command.env("LD_LIBRARY_PATH", directory);
        }
        Ok(())
    }

    fn rustflags(&self) -> Vec<String> {
        let mut flags: Vec<String> = FLAGS.map(String::from).into();
        let source = self.sysroot.join("lib/rustlib/src/rust");
        let mut remap = |from: &Path, to: &str| flags.push(format!("--remap-path-prefix={}={to}", from.display()));
        // The last one that fits wins.
        remap(&workspace::root(), "/tracer");
        for registry in registries() {
            remap(&registry, "/registry");
        }
        remap(&source, "/rust");
        if let Ok(real) = source.canonicalize() {
            remap(&real, "/rust");
        }
        flags
    }
}

/// The shared library of LLVM that a compiler loads.
fn llvm_library(rustc: &Path) -> Option<PathBuf> {
    let listing = workspace::output(Command::new("ldd").arg(rustc)).ok()?;
    let line = listing.lines().find(|line| line.trim_start().starts_with("libLLVM"))?;
    let (_, path) = line.split_once("=> ")?;
    Some(path.split_whitespace().next()?.into())
}

/// The directories that hold the sources of dependencies, one for each registry or mirror in use.
fn registries() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cargo_home().join("registry/src")) else {
        return Vec::new();
    };
    let mut all: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    all.sort();
    all
}

fn home() -> Option<PathBuf> {
    env::var_os("HOME").map(PathBuf::from)
}

fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map(PathBuf::from).unwrap_or_else(|| home().unwrap_or_default().join(".cargo"))
}

fn bpf_target_dir() -> PathBuf {
    workspace::target_dir().join("bpf")
}

fn committed() -> PathBuf {
    workspace::root().join("tracer-ebpf/tracer.bpf.o")
}

fn record_path() -> PathBuf {
    workspace::root().join("tracer-ebpf/tracer.bpf.o.toolchain")
}

/// The lines of the record that name the tools.
fn recorded_tools() -> Result<String> {
    let path = record_path();
    let record = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; run `cargo xtask ebpf` first", path.display()))?;
    let tools = record.lines().filter(|line| !line.starts_with("sha256: ") && !line.starts_with("flags: "));
    Ok(tools.flat_map(|line| [line, "\n"]).collect())
}

fn flags_line() -> String {
    let profile = PROFILE.map(|(name, value)| format!("{}={value}", name.to_lowercase().replace('_', "-")));
    format!("flags: {} {}\n", FLAGS.join(" "), profile.join(" "))
}

fn sha256(path: &Path) -> Result<String> {
    let line = workspace::output(Command::new("sha256sum").arg(path))?;
    Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
}

/// The object without its `.debug_*` sections and their relocations. `.BTF` and `.BTF.ext` stay: the kernel reads them.
fn without_dwarf(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read(bytes)?;
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    elf.delete_orphans();
    // LLVM keeps the names of sections and of symbols in one table, `object` writes two.
    if !elf.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = elf.sections.add();
        names.name = b".shstrtab".as_slice().into();
        names.sh_type = object::elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut out = Vec::new();
    elf.write(&mut out)?;
    Ok(out)
}

/// Fails if the object names a directory of this machine.
fn refuse_paths(object: &[u8]) -> Result<()> {
    let mut needles = vec![workspace::root(), workspace::target_dir(), cargo_home()];
    needles.extend(home());
    // Whichever machine built it.
    needles.extend(["home", "root", "tmp", "usr"].map(|top| format!("/{top}/").into()));
    for needle in needles {
        let bytes = needle.as_os_str().as_encoded_bytes();
        if bytes.len() > 1 && object.windows(bytes.len()).any(|window| window == bytes) {
            bail!("the object contains the path {}, which is this machine's", needle.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_this_machine_is_refused() {
        let path = workspace::root().join("tracer-ebpf/src/main.rs");
        assert!(refuse_paths(format!("\0{}\0", path.display()).as_bytes()).is_err());
        assert!(refuse_paths(b"\0/tracer/tracer-ebpf/src/main.rs\0/registry/aya-ebpf/src/lib.rs\0").is_ok());
    }

    #[test]
    fn the_committed_object_has_btf_and_no_dwarf() -> Result<()> {
        let bytes = fs::read(committed())?;
        refuse_paths(&bytes)?;
        let elf = Builder::read(bytes.as_slice())?;
        let names: Vec<_> = elf.sections.iter().map(|section| section.name.to_string()).collect();
        assert!(names.iter().any(|name| name == ".BTF") && names.iter().any(|name| name == ".BTF.ext"), "{names:?}");
        assert!(!names.iter().any(|name| name.contains("debug")), "{names:?}");
        Ok(())
    }
}
