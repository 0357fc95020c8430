//! Names the object with the kernel programs: the committed one, or the one that `TRACER_BPF_OBJECT` names.

use std::env;
use std::path::PathBuf;

fn main() {
    let object = env::var_os("TRACER_BPF_OBJECT").filter(|path| !path.is_empty()).map_or_else(
        || {
            let manifest = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
            PathBuf::from(manifest).join("../tracer-ebpf/tracer.bpf.o")
        },
        PathBuf::from,
    );
    println!("cargo::rerun-if-env-changed=TRACER_BPF_OBJECT");
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env=TRACER_BPF_OBJECT={}", object.display());
}
