//! Events in, one JSON object a line out.
//!
//! JSON lets most control characters of Unicode stand in strings as they are. Here they are written as `\u….` as well: a
//! line of output that is shown on a terminal must not be able to do anything to it.

use std::io::{self, Write};

use serde_json::ser::{Formatter, Serializer};

use super::escape::is_hostile;
use crate::event::Event;

/// Writes NDJSON.
#[derive(Debug, Default)]
pub struct Json {
    line: Vec<u8>,
}

impl Json {
    /// Appends one line, in one write.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn event(&mut self, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        self.line.clear();
        append(&mut self.line, event)?;
        out.write_all(&self.line)
    }
}

/// Appends any value as one line.
///
/// # Errors
/// The value cannot be JSON.
pub(crate) fn append(out: &mut Vec<u8>, value: &impl serde::Serialize) -> io::Result<()> {
    value.serialize(&mut Serializer::with_formatter(&mut *out, Harmless))?;
    out.push(b'\n');
    Ok(())
}

/// Compact JSON without raw control characters.
struct Harmless;

impl Formatter for Harmless {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // The serializer has already escaped C0 controls. Nearly everything else is ASCII, and goes out in one piece.
        if fragment.bytes().all(|byte| byte < 0x7f) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut from = 0;
        for (at, c) in fragment.char_indices().filter(|(_, c)| is_hostile(*c)) {
            writer.write_all(&fragment.as_bytes()[from..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            from = at + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[from..])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Serialize as _;

    use super::*;

    fn json(text: &str) -> String {
        let mut out = Vec::new();
        text.serialize(&mut Serializer::with_formatter(&mut out, Harmless)).expect("JSON");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn controls_are_escaped() {
        assert_eq!(json("a\x1b\"\\\n\0"), r#""a\u001b\"\\\n\u0000""#);
        assert_eq!(json("\x7f\u{9b}\u{202e}x\u{2028}\u{2066}"), r#""\u007f\u009b\u202ex\u2028\u2066""#);
        assert_eq!(json("\u{e0041}"), r#""\udb40\udc41""#);
        assert_eq!(json("größe 日本 🦀"), "\"größe 日本 🦀\"");
    }

    proptest! {
        #[test]
        fn the_text_stays_the_same(text in any::<String>()) {
            let json = json(&text);
            prop_assert!(!json.chars().any(is_hostile));
            prop_assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), text);
        }
    }
}
