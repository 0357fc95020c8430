//! placeholder
mod decode;
mod event;
fn main() {}
