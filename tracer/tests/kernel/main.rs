//! The real binary on a real kernel: real sockets in, the records that it printed out.
//!
//! Needs root, and fails without it: a test that was skipped would look like one that passed. Run it with
//! `cargo xtask test`. Every test has its own port and its own tracer, filtered to that port, so that all may run at once.

mod causes;
mod classic;
mod cli;
mod close_wait;
mod degraded;
mod doctor;
mod endings;
mod faults;
mod features;
mod filters;
mod fin_wait2;
mod floods;
#[path = "../harmless/mod.rs"]
mod harmless;
mod heads;
mod hostile;
mod ledger;
mod leftovers;
mod machine;
mod messages;
mod names;
mod netns;
mod older;
mod owners;
mod peer;
mod pid;
mod privacy;
mod privileges;
mod readers;
mod record;
mod rig;
mod sandbox;
mod scale;
mod script;
mod servers;
mod slots;
mod snapshot;
mod sockets;
mod states;
mod summary;
mod unit;
mod web;
mod wire;
