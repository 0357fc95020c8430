//! The scan of one request's head, compiled for the host: it tells how the scanner changes, not what it costs in the
//! kernel. `cargo bench --package tracer-ebpf`

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use tracer_ebpf::head::{self, Http, INGRESS, MAX_STEPS, Window};
use tracer_ebpf::role;

fn main() {
    divan::main();
}

/// What the kernel's driver does with each segment.
fn segment(http: &mut Http, seq: u32, bytes: &[u8]) {
    let Some(at) = head::enter(http, INGRESS, seq, bytes.len() as u32) else { return };
    let mut window = Window::EMPTY;
    head::begin(&mut window, at, bytes.len() as u32, false);
    let mut finished = false;
    for _ in 0..MAX_STEPS {
        if let Some((at, n)) = head::refill(http, INGRESS, &mut window) {
            let (at, n) = (at as usize, n as usize);
            bytemuck::cast_slice_mut::<u64, u8>(&mut window.words)[..n].copy_from_slice(&bytes[at..at + n]);
        }
        if !head::step(http, INGRESS, &mut window) {
            finished = true;
            break;
        }
    }
    head::leave(http, INGRESS, finished);
}

/// One head on a new connection, cut into segments of this size.
fn scan(bencher: Bencher<'_, '_>, head: &str, size: usize) {
    let mut fresh = Http::ZERO;
    head::role(&mut fresh, role::SERVER);
    let once = || {
        let mut http = fresh;
        let mut seq = 1;
        for bytes in head.as_bytes().chunks(size) {
            segment(&mut http, seq, black_box(bytes));
            seq += bytes.len() as u32;
        }
        http
    };
    assert_eq!(once().exchange.requests, 1, "the whole head is seen");
    bencher.counter(BytesCount::of_str(head)).bench_local(once);
}

fn with(fields: &str) -> String {
    format!("GET /api/v1/user?id=17 HTTP/1.1\r\nHost: www.example.com\r\nUser-Agent: wrk\r\n{fields}\r\n")
}

#[divan::bench]
fn plain(bencher: Bencher<'_, '_>) {
    scan(bencher, &with("Accept: */*\r\nConnection: keep-alive\r\n"), usize::MAX);
}

#[divan::bench]
fn cookie_of_2_kib(bencher: Bencher<'_, '_>) {
    scan(bencher, &with(&format!("Cookie: session={}\r\nConnection: close\r\n", "x".repeat(2048))), usize::MAX);
}

#[divan::bench(args = [1, 7, 64])]
fn cut(bencher: Bencher<'_, '_>, size: usize) {
    scan(bencher, &with("Accept: */*\r\nConnection: keep-alive\r\n"), size);
}
