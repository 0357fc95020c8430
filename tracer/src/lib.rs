//! The steps of `tracer run` as modules, in the order of the flow: each takes what the one before it gives.
//!
//! A library only so that tests can feed recorded bytes to the steps that need no root. Its API is not stable.

#[cfg(target_endian = "big")]
compile_error!("tracer is for little-endian machines: so are its kernel programs, their records, and the head scanner");

pub mod alert;
pub mod broker;
pub mod cast;
pub mod cli;
pub mod connection;
pub mod decode;
pub mod demo;
pub mod descendants;
pub mod doctor;
pub mod event;
pub mod explain;
pub mod filter;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod kernel;
pub mod launcher;
pub mod ledger;
pub mod manual;
mod memory;
pub mod offsets;
pub mod preflight;
pub mod privileges;
pub mod process;
mod recent;
pub mod record;
pub mod report;
pub mod reporter;
pub mod ring;
pub mod run;
pub mod sandbox;
pub mod sink;
pub mod snapshot;
mod time_namespace;
pub mod time_wait;
mod trial;
pub mod verdict;
