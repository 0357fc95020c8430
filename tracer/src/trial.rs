//! Small programs on trial: what the running kernel accepts, where neither its version nor its types tell.
//!
//! What comes in: type ids of the kernel. What goes out: whether it loads a program, which is gone at once. Hardened kernels refuse
//! more than others, and a program of tracer's that such a kernel refuses is replaced by another one, or done without.

use std::io;

use tracer_ebpf::cast_to;

use crate::cast::Cast;
use crate::kernel::bpf::{self, BPF_TRACE_ITER};

/// `enum bpf_cmd` and `enum bpf_prog_type` in `include/uapi/linux/bpf.h`.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
const BPF_PROG_TYPE_TRACING: u32 = 26;
/// The number of the helper.
const BPF_SOCK_FROM_FILE: u32 = 162;
/// Where in a `struct bpf_iter__task_file` the file is.
const FILE: u16 = 24;

/// `union bpf_attr` for a program, up to where this needs it.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    /// Addresses of the instructions, and of a string.
    insns: u64,
    license: u64,
    /// `log_level` to `prog_ifindex`
    _unused: [u32; 11],
    expected_attach_type: u32,
    /// `prog_btf_fd` to `line_info_cnt`
    _unused_too: [u32; 9],
    attach_btf_id: u32,
}
const _: () = assert!(std::mem::offset_of!(ProgLoad, expected_attach_type) == 68);
const _: () = assert!(std::mem::offset_of!(ProgLoad, attach_btf_id) == 108);

/// `struct bpf_insn`, as it is in memory.
pub(crate) const fn instruction(code: u8, registers: u8, offset: u16, immediate: u32) -> [u8; 8] {
    let ([a, b], [c, d, e, f]) = (offset.to_le_bytes(), immediate.to_le_bytes());
    [code, registers, a, b, c, d, e, f]
}

/// `BPF_ALU64 | BPF_MOV | BPF_K`
pub(crate) const MOV: u8 = 0xb7;
/// `BPF_JMP | BPF_CALL`
pub(crate) const CALL: u8 = 0x85;
/// `BPF_LDX | BPF_MEM | BPF_DW`
const LOAD: u8 = 0x79;
/// `BPF_JMP | BPF_JEQ | BPF_K`
const IF_EQUAL: u8 = 0x15;
/// `BPF_JMP | BPF_EXIT`
const EXIT: u8 = 0x95;

/// What a program that does nothing ends with.
const END: [[u8; 8]; 2] = [instruction(MOV, 0, 0, 0), instruction(EXIT, 0, 0, 0)];

/// Whether the kernel accepts a cast that takes no call. (What of, it does not ask.)
///
/// # Errors
/// It does not, and says why not.
pub(crate) fn cast(cast: Cast) -> io::Result<()> {
    let [argument, call] = cast.instructions(cast.sock);
    let [result, exit] = END;
    load(BPF_PROG_TYPE_CGROUP_SKB, None, &[argument, call, result, exit])
}

/// Whether helpers take the socket of an open file, in a walk over open files: `walk` is the function `bpf_iter_task_file`, and `sk` the
/// offset of that member in `struct socket`. Upstream kernels let them; hardened ones take what is read there for a number.
pub(crate) fn trusts_open_files(walk: u32, sk: u32) -> bool {
    let Ok(sk) = u16::try_from(sk) else { return false };
    let [result, exit] = END;
    let program = [
        instruction(LOAD, 0x11, FILE, 0),
        instruction(IF_EQUAL, 0x01, 4, 0),
        instruction(CALL, 0, 0, BPF_SOCK_FROM_FILE),
        instruction(IF_EQUAL, 0x00, 2, 0),
        instruction(LOAD, 0x01, sk, 0),
        instruction(CALL, 0, 0, cast_to::HELPER),
        result,
        exit,
    ];
    // What is refused for another reason, such as want of memory, says nothing of this.
    match load(BPF_PROG_TYPE_TRACING, Some(walk), &program) {
        Ok(()) => true,
        Err(error) => !matches!(error.raw_os_error(), Some(libc::EACCES | libc::EINVAL)),
    }
}

/// Whether the kernel accepts any program at all for a walk: the function `bpf_iter_…`.
///
/// # Errors
/// As for [`cast`].
pub(crate) fn walk(function: u32) -> io::Result<()> {
    load(BPF_PROG_TYPE_TRACING, Some(function), &END)
}

fn load(prog_type: u32, walk: Option<u32>, instructions: &[[u8; 8]]) -> io::Result<()> {
    let attributes = ProgLoad {
        prog_type,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: if walk.is_some() { BPF_TRACE_ITER } else { 0 },
        attach_btf_id: walk.unwrap_or(0),
        ..ProgLoad::default()
    };
    // The verifier answers that it is to be asked again if there is a signal.
    for _ in 0..9 {
        match bpf::call(BPF_PROG_LOAD, &attributes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done.map(drop),
        }
    }
    bpf::call(BPF_PROG_LOAD, &attributes).map(drop)
}
