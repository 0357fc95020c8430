//! What may be shown of names that others chose: written down once more, rather than taken from the code that is tested.

/// Printable characters and line ends, nothing that moves, colours, reorders or hides.
pub(crate) fn is_harmless(text: &str) -> bool {
    let is_format = |c| {
        matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
    };
    text.chars().all(|c| c == '\n' || !(c.is_control() || is_format(c)))
}
