#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tracer_ebpf_fuzz::checks::head(data));
