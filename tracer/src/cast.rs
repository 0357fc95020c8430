//! Has the programs cast sockets without a call, where the kernel can.
//!
//! What comes in: the object, in which a helper makes the casts, with marks ([`cast_to`]). What goes out: the same object with
//! `bpf_rdonly_cast` in its place, which the kernel compiles to a move (since Linux 6.2), if this kernel has it and accepts it.

use tracer_ebpf::cast_to;

use crate::trial::{CALL, MOV, instruction};

/// Type ids of this kernel, see [`crate::offsets::Types`].
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    /// The function `bpf_rdonly_cast`.
    pub function: u32,
    /// The type `struct sock`.
    pub sock: u32,
    /// The type `struct tcp_sock`.
    pub tcp_sock: u32,
}

/// As the source register of a call: its immediate is no helper's number, but the type id of a function of the kernel.
const BPF_PSEUDO_KFUNC_CALL: u8 = 2 << 4;

const fn second_argument(value: u32) -> [u8; 8] {
    instruction(MOV, 2, 0, value)
}

impl Cast {
    /// What makes a cast to a type.
    pub(crate) fn instructions(self, to: u32) -> [[u8; 8]; 2] {
        [second_argument(to), instruction(CALL, BPF_PSEUDO_KFUNC_CALL, 0, self.function)]
    }

    /// Has the programs in `object` cast so.
    pub(crate) fn put_into(self, object: &mut [u8]) {
        const HELPER: [u8; 8] = instruction(CALL, 0, 0, cast_to::HELPER);
        let (instructions, _) = object.as_chunks_mut::<8>();
        for at in 1..instructions.len() {
            if instructions[at] != HELPER {
                continue;
            }
            for (mark, to) in [(cast_to::SOCK, self.sock), (cast_to::TCP_SOCK, self.tcp_sock)] {
                if instructions[at - 1] == second_argument(mark as u32) {
                    [instructions[at - 1], instructions[at]] = self.instructions(to);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cast_is_replaced_and_nothing_else() {
        let [sock, tcp_sock] = [cast_to::SOCK, cast_to::TCP_SOCK].map(|mark| second_argument(mark as u32));
        let (helper, other) = (instruction(CALL, 0, 0, 137), instruction(CALL, 0, 0, 136));
        let mut object = [sock, helper, sock, other, helper, tcp_sock, helper].concat();
        let cast = Cast { function: 0x0102_0304, sock: 0x0506_0708, tcp_sock: 0x090a_0b0c };
        cast.put_into(&mut object);
        let to_sock = [0xb7, 2, 0, 0, 8, 7, 6, 5];
        let to_tcp_sock = [0xb7, 2, 0, 0, 0xc, 0xb, 0xa, 9];
        let call = [0x85, 0x20, 0, 0, 4, 3, 2, 1];
        assert_eq!(object, [to_sock, call, sock, other, helper, to_tcp_sock, call].concat());
    }
}
