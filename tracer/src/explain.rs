//! A cause in, what there is to know about it out: what it means, how to confirm it by hand, and what to change.
//!
//! The text is `docs/causes.md`, which the README links to: there is one for both. It is shown without the marks of
//! Markdown that only a page needs; commands and URLs are never cut or changed, so that they can be copied.

use std::io::{self, Write};

use anstyle::Style;
use clap::ValueEnum as _;

use crate::event::Cause;

const TEXT: &str = include_str!("../../docs/causes.md");

const TITLE: Style = Style::new().bold().underline();
const HEADING: Style = Style::new().bold();

/// Writes the section of `cause`, and what holds for the commands of each; or, without a cause, all of the text.
/// `styled`: with the escape sequences of a terminal.
///
/// # Errors
/// Those of `out`.
pub fn explain(cause: Option<Cause>, styled: bool, out: &mut dyn Write) -> io::Result<()> {
    let Some(cause) = cause else { return show(TEXT, styled, out) };
    show(section(cause).unwrap_or_default(), styled, out)?;
    let (introduction, _) = TEXT.split_once("\n## ").unwrap_or_default();
    let (_, on_commands) = introduction.trim_end().rsplit_once("\n\n").unwrap_or_default();
    writeln!(out)?;
    show(on_commands, styled, out)
}

/// From the heading with the cause's word to the next one of its level.
fn section(cause: Cause) -> Option<&'static str> {
    let word = cause.to_possible_value()?;
    let begin = TEXT.find(&format!("\n## {}\n", word.get_name()))? + 1;
    let text = &TEXT[begin..];
    Some(text[1..].find("\n## ").map_or(text, |end| &text[..=end]).trim_end())
}

fn show(text: &str, styled: bool, out: &mut dyn Write) -> io::Result<()> {
    let mut code = false;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("```") {
            code = !code;
        } else if code {
            writeln!(out, "    {line}")?;
        } else if let Some(heading) = line.strip_prefix("### ") {
            styled_line(HEADING, &heading.to_uppercase(), styled, out)?;
            // What belongs to a heading is right below it.
            lines.next_if(|line| line.is_empty());
        } else if let Some(title) = line.strip_prefix("## ").or_else(|| line.strip_prefix("# ")) {
            styled_line(TITLE, title, styled, out)?;
        } else {
            writeln!(out, "{}", without_marks(line, styled))?;
        }
    }
    Ok(())
}

fn styled_line(style: Style, text: &str, styled: bool, out: &mut dyn Write) -> io::Result<()> {
    if styled { writeln!(out, "{style}{text}{style:#}") } else { writeln!(out, "{text}") }
}

/// `[text](url)` as `text <url>`, `**text**` as `text`, in bold if styled. What stands between back-quotes stays as it is.
fn without_marks(line: &str, styled: bool) -> String {
    let mut shown = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(['`', '*', '[']) {
        shown.push_str(&rest[..at]);
        let marked = &rest[at..];
        rest = if let Some((code, after)) = between(marked, "`", "`") {
            shown.extend(["`", code, "`"]);
            after
        } else if let Some((text, after)) = between(marked, "**", "**") {
            if styled {
                shown.push_str(&format!("{HEADING}{text}{HEADING:#}"));
            } else {
                shown.push_str(text);
            }
            after
        } else if let Some((text, after)) = between(marked, "[", "]")
            && let Some((url, after)) = between(after, "(", ")")
        {
            shown.extend([text, " <", url, ">"]);
            after
        } else {
            shown.push_str(&marked[..1]);
            &marked[1..]
        };
    }
    shown.push_str(rest);
    shown
}

fn between<'a>(text: &'a str, open: &str, close: &str) -> Option<(&'a str, &'a str)> {
    text.strip_prefix(open)?.split_once(close)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(cause: Cause) -> String {
        cause.to_possible_value().expect("not hidden").get_name().to_owned()
    }

    /// What follows each heading that begins with `mark`.
    fn parts<'a>(text: &'a str, mark: &str) -> Vec<(&'a str, &'a str)> {
        let (mut parts, mut code, mut begin) = (Vec::new(), false, 0);
        let mut heading = None;
        for line in text.split_inclusive('\n') {
            let at = line.as_ptr() as usize - text.as_ptr() as usize;
            code ^= line.starts_with("```");
            if !code && let Some(next) = line.strip_prefix(mark) {
                parts.extend(heading.replace(next.trim_end()).map(|heading| (heading, text[begin..at].trim())));
                begin = at + line.len();
            }
        }
        parts.extend(heading.map(|heading| (heading, text[begin..].trim())));
        parts
    }

    #[test]
    fn the_words_on_the_command_line_are_those_of_the_output() {
        for cause in Cause::value_variants() {
            assert_eq!(serde_json::to_value(cause).expect("a word"), word(*cause));
        }
    }

    #[test]
    fn every_cause_has_its_section_in_the_order_of_the_rules() {
        let sections: Vec<_> = parts(TEXT, "## ").into_iter().map(|(heading, _)| heading.to_owned()).collect();
        let causes: Vec<_> = Cause::value_variants().iter().map(|cause| word(*cause)).collect();
        assert_eq!(sections, causes);
    }

    #[test]
    fn the_readme_links_to_every_section() {
        let readme = include_str!("../../README.md");
        for cause in Cause::value_variants() {
            let word = word(*cause);
            assert!(readme.contains(&format!("[`{word}`](docs/causes.md#{word})")), "{word}");
        }
    }

    #[test]
    fn every_section_has_all_of_its_parts() {
        for (cause, section) in parts(TEXT, "## ") {
            let parts = parts(section, "### ");
            let headings: Vec<_> = parts.iter().map(|(heading, _)| *heading).collect();
            assert_eq!(headings, ["Meaning", "Recognised by", "Confirm by hand", "Change", "RFC"], "{cause}");
            let [(_, meaning), (_, recognised), (_, confirm), (_, change), (_, rfc)] = parts[..] else {
                panic!("{cause}")
            };
            assert!(meaning.len() > 80 && recognised.len() > 20, "{cause}");
            assert!(confirm.starts_with("```sh\n"), "{cause}");
            for command in ["ss ", "tcpdump "] {
                assert!(confirm.lines().any(|line| line.starts_with(command)), "{cause}: no {command}");
            }
            let programs: Vec<_> =
                change.lines().filter_map(|line| line.strip_prefix("- **")?.split_once(":**")).collect();
            assert!(programs.iter().all(|(_, what)| what.len() > 10), "{cause}: {programs:?}");
            let programs: Vec<_> = programs.into_iter().map(|(program, _)| program).collect();
            assert_eq!(programs, ["nginx", "Apache", "HAProxy", "Go", "Java", "Node", "Python"], "{cause}");
            assert!(!change.starts_with("- "), "{cause}: what to do in general comes first");
            assert!(rfc.starts_with("[RFC ") && rfc.contains("(https://www.rfc-editor.org/rfc/rfc"), "{cause}");
        }
    }

    /// A link says what it links to: the section in its text is the one in its URL.
    #[test]
    fn links_lead_to_the_section_that_they_name() {
        let mut links = 0;
        let mut rfc = "";
        let mut rest = TEXT;
        while let Some((before, after)) = rest.split_once("](https://www.rfc-editor.org/rfc/rfc") {
            let (_, text) = before.rsplit_once('[').expect("the link's text");
            let (url, after) = after.split_once(')').expect("the URL's end");
            let (number, place) = url.split_once('#').unwrap_or((url, ""));
            let section = match text.strip_prefix("RFC ") {
                Some(text) => {
                    let (named, section) = text.split_once(", ").unwrap_or((text, ""));
                    rfc = named;
                    section
                }
                None => text,
            };
            assert_eq!((number, place), (rfc, section.replace(' ', "-").as_str()), "{text}");
            links += 1;
            rest = after;
        }
        assert!(links >= 17, "{links}");
    }

    #[test]
    fn one_cause_is_its_section_and_a_word_on_the_commands() {
        let shown = |cause| {
            let mut out = Vec::new();
            explain(cause, false, &mut out).expect("written");
            String::from_utf8(out).expect("text")
        };
        let all = shown(None);
        for cause in Cause::value_variants() {
            let one = shown(Some(*cause));
            assert!(one.starts_with(&format!("{}\n\nMEANING\n", word(*cause))), "{one}");
            assert_eq!(one.matches("\nMEANING\n").count(), 1, "{one}");
            let (section, on_commands) = one.trim_end().rsplit_once("\n\n").expect("two paragraphs");
            assert!(on_commands.starts_with("The commands take port 8080"), "{on_commands}");
            assert!(all.contains(section) && all.contains(on_commands), "{one}");
        }
        assert!(!all.contains("](") && !all.contains("**") && !all.contains("```") && !all.contains("\n#"), "{all}");
        assert!(!all.contains('\x1b'));
        let longest = all.lines().map(|line| line.chars().count()).max();
        // A URL is not cut.
        assert!(longest <= Some(130), "{longest:?}");
    }

    #[test]
    fn marks() {
        for (line, plain) in [
            ("a `b ** [c](d)` **e** f", "a `b ** [c](d)` e f"),
            ("[RFC 1, section 2](https://x/#s) (y),", "RFC 1, section 2 <https://x/#s> (y),"),
            ("a [b] * c ** `d", "a [b] * c ** `d"),
            ("", ""),
        ] {
            assert_eq!(without_marks(line, false), plain);
        }
        assert_eq!(without_marks("- **Go:** `x`", true), "- \x1b[1mGo:\x1b[0m `x`");
    }
}
