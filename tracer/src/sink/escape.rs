//! Text from the network or from another process in, text that a terminal can be given out.
//!
//! Whatever could move the cursor, colour, hide, reorder or merge what stands beside it is written as `\x1b` or `\u{..}`.
//! Widths are counted in columns of a terminal, and what is cut is cut between characters and marked with `…`.

use unicode_width::UnicodeWidthChar as _;

/// Whether a character must not reach a terminal as it is, in any output.
pub(crate) const fn is_hostile(c: char) -> bool {
    matches!(c,
        '\0'..='\x1f' | '\x7f'..='\u{9f}' // C0, DEL, C1
        | '\u{ad}' // soft hyphen
        | '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' // bidi controls
        | '\u{180e}' | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{feff}' // zero width
        | '\u{206a}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' // deprecated formats, tags
        | '\u{2028}' | '\u{2029}' // line and paragraph separators
    )
}

/// Columns that a character takes; `None` if it must be escaped. A combining character would merge with its neighbour;
/// the replacement character stands for bytes that were no UTF-8.
fn columns(c: char) -> Option<usize> {
    if matches!(c, ' '..='~') {
        return Some(1);
    }
    if is_hostile(c) || c == char::REPLACEMENT_CHARACTER {
        return None;
    }
    c.width().filter(|width| *width > 0)
}

/// Whether all of it can be shown as it is, in a column each.
pub(crate) fn is_plain(text: &str) -> bool {
    let (words, rest) = text.as_bytes().as_chunks();
    words.iter().all(|word| are_plain(u64::from_ne_bytes(*word))) && rest.iter().all(|byte| matches!(byte, b' '..=b'~'))
}

/// The same of eight bytes at once.
const fn are_plain(word: u64) -> bool {
    const ONES: u64 = u64::MAX / 0xff;
    // The highest bit of a byte is set where it is no ASCII, where it is below a space and so borrows, and where it is DEL.
    // Borrows reach other bytes only from one that is not plain.
    (word | word.wrapping_sub(ONES * b' ' as u64) | word.wrapping_add(ONES)) & (ONES * 0x80) == 0
}

/// Appends `text`, escaped, as far as it fits into `max` columns. Answers the columns used, at most `max`; what does
/// not fit is replaced by `…`.
pub(crate) fn fit(out: &mut String, text: &str, max: usize) -> usize {
    // Nearly all text is this, and it is most of the work for a line.
    if is_plain(text) {
        if text.len() <= max {
            out.push_str(text);
            return text.len();
        }
        let Some(shown) = max.checked_sub(1).and_then(|max| text.get(..max)) else { return 0 };
        out.push_str(shown);
        out.push('…');
        return max;
    }
    let start = out.len();
    let mut used = 0;
    // Where to cut: the last place that leaves a column for the mark.
    let mut cut = (start, 0);
    for c in text.chars() {
        let before = out.len();
        used += match columns(c) {
            Some(width) => {
                out.push(c);
                width
            }
            None => {
                escape(out, c);
                out.len() - before
            }
        };
        if used > max {
            out.truncate(cut.0);
            if max == 0 {
                return 0;
            }
            out.push('…');
            return cut.1 + 1;
        }
        if used < max {
            cut = (out.len(), used);
        }
    }
    used
}

fn escape(out: &mut String, c: char) {
    use std::fmt::Write as _;
    let code = u32::from(c);
    // Writing to a string does not fail.
    let _ = if code < 0x100 { write!(out, "\\x{code:02x}") } else { write!(out, "\\u{{{code:x}}}") };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fitted(text: &str, max: usize) -> (String, usize) {
        let mut out = String::from("> ");
        let used = fit(&mut out, text, max);
        (out[2..].to_owned(), used)
    }

    fn width(text: &str) -> usize {
        text.chars().map(|c| c.width().unwrap_or(0)).sum()
    }

    #[test]
    fn harmless_text_stays() {
        for text in ["", "/index.html?a=b", "nginx: worker", "größe", "日本", "🦀"] {
            assert_eq!(fitted(text, 80), (text.to_owned(), width(text)));
        }
    }

    #[test]
    fn hostile_text_is_escaped() {
        let cases = [
            ("\x1b[31mred", r"\x1b[31mred"),
            ("a\0b\r\n\t\x7f", r"a\x00b\x0d\x0a\x09\x7f"),
            ("\u{9b}31m", r"\x9b31m"),
            ("\u{202e}gpj.exe", r"\u{202e}gpj.exe"),
            ("\u{2066}\u{2069}\u{61c}", r"\u{2066}\u{2069}\u{61c}"),
            ("\u{2028}\u{2029}", r"\u{2028}\u{2029}"),
            ("\u{200b}\u{200d}\u{feff}", r"\u{200b}\u{200d}\u{feff}"),
            ("e\u{301}", r"e\u{301}"),
            ("\u{fffd}", r"\u{fffd}"),
            ("\u{e0041}", r"\u{e0041}"),
        ];
        for (text, expected) in cases {
            assert_eq!(fitted(text, 80), (expected.to_owned(), expected.len()), "{text:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_between_characters() {
        assert_eq!(fitted("abcdef", 6), ("abcdef".to_owned(), 6));
        assert_eq!(fitted("abcdef", 5), ("abcd…".to_owned(), 5));
        assert_eq!(fitted("abcdef", 1), ("…".to_owned(), 1));
        assert_eq!(fitted("abcdef", 0), (String::new(), 0));
        assert_eq!(fitted("", 0), (String::new(), 0));
        // A wide character that would stand half outside, an escape that would be cut.
        assert_eq!(fitted("日本語", 4), ("日…".to_owned(), 3));
        assert_eq!(fitted("日本語", 5), ("日本…".to_owned(), 5));
        assert_eq!(fitted("a\x1bb", 5), ("a…".to_owned(), 2));
        assert_eq!(fitted("a\x1bb", 6), (r"a\x1bb".to_owned(), 6));
    }

    proptest! {
        #[test]
        fn plain_is_what_is_plain_byte_by_byte(text in "([ -~]{0,20}|[ -~]{0,9}[\\x00-\\xff][ -~]{0,9})") {
            prop_assert_eq!(is_plain(&text), text.bytes().all(|byte| matches!(byte, b' '..=b'~')));
        }

        #[test]
        fn never_wider_never_raw(text in any::<String>(), max in 0_usize..40) {
            let (out, used) = fitted(&text, max);
            prop_assert!(used <= max);
            prop_assert_eq!(width(&out), used);
            prop_assert!(!out.chars().any(|c| is_hostile(c) || c.width().unwrap_or(0) == 0));
        }
    }
}
