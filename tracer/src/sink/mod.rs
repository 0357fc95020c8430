//! Events in, bytes out: as text for people, as JSON for programs, or as a page to attach to an incident.
//!
//! Sinks see events only, never wire types. What came from the network or from another process is escaped here, and only
//! here, before it can reach a terminal. Each event goes out in one write.

pub(crate) mod escape;
pub mod html;
pub mod json;
mod pieces;
pub mod summary;
pub mod text;

use std::io::{self, Write};

use crate::event::Event;
pub use html::Page;
pub use json::Json;
pub use text::Text;

/// How events are printed.
#[derive(Debug)]
pub enum Sink {
    /// Aligned columns.
    Text(Text),
    /// One JSON object a line.
    Json(Json),
}

impl Sink {
    /// Text in the local time zone; `styled`: with the escape sequences of a terminal.
    pub fn text(styled: bool) -> Self {
        Self::Text(Text::new(jiff::tz::TimeZone::system(), styled))
    }

    /// NDJSON.
    pub fn json() -> Self {
        Self::Json(Json::default())
    }

    /// Prints one event.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn event(&mut self, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Text(text) => text.event(event, out),
            Self::Json(json) => json.event(event, out),
        }
    }
}
