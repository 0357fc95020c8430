//! What the fuzz targets check: bytes in, a panic if the scanner is wrong.
//!
//! The same checks run on the committed corpus and on generated conversations in `cargo test`, on stable (`head_tests.rs`
//! includes these files); this package only feeds them from libFuzzer. See `README.md` beside it.

use tracer_ebpf::head;

pub mod checks;
pub mod reader;
