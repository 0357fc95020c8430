//! Events in, lines out: filtered, counted in the books, and formatted, each as soon as it is known.
//!
//! An event is made, formatted and freed before the next record is looked at: so all of them live in the same few pieces of
//! memory, which stay in the CPU's nearest cache. Only their lines wait, for the writer. It must wait for nothing itself.

use std::io;

use super::Books;
use crate::event::Event;
use crate::filter::Filter;
use crate::reporter::{Ask, Reporter};
use crate::sink::summary::Moment;

/// Where events go.
pub(super) struct Outbox {
    pub(super) books: Books,
    /// `None`: it would let all pass.
    pub(super) filter: Option<Filter>,
    pub(super) reporter: Reporter,
    /// Those that [`Outbox::pass`] will take.
    pub(super) events: Vec<Event>,
    /// What was made of the others.
    pub(super) lines: Vec<u8>,
    /// Some passed since this was set to `false`.
    pub(super) has_passed: bool,
    /// Why one of them could not be printed.
    pub(super) failure: Option<io::Error>,
}

impl Outbox {
    /// With one event in it.
    pub(super) fn new(books: Books, filter: Filter, reporter: Reporter, event: Event) -> Self {
        let filter = (!filter.is_empty()).then_some(filter);
        Self { books, filter, reporter, events: vec![event], lines: Vec::new(), has_passed: false, failure: None }
    }

    /// Turns the events into lines; none is left. What fails is kept for [`Outbox::answer`].
    pub(super) fn pass(&mut self) {
        if let Some(filter) = &self.filter {
            self.books.sift(filter, &mut self.events);
        }
        if self.events.is_empty() {
            return;
        }
        self.has_passed = true;
        self.books.sent(&self.events);
        if let Err(error) = self.reporter.take(&self.events, None, &mut self.lines) {
            self.failure = Some(error);
        }
        self.events.clear();
    }

    /// Passes the events on, and then appends the lines of what is asked for.
    ///
    /// # Errors
    /// They, or an event since the last call, cannot be printed.
    pub(super) fn answer(&mut self, ask: Option<(Ask, Moment)>) -> io::Result<()> {
        self.pass();
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.reporter.take(&[], ask, &mut self.lines)
    }
}
