//! Text in which some runs stand out: coloured for a terminal, between marks for a file.

use std::ffi::OsStr;

use clap::ColorChoice;

const TARGET: &str = "\x1b[30;42m";
const OTHER: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// A run of text, and whether the loss counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run<'a> {
    /// The text.
    pub text: &'a str,
    /// Whether it is a target.
    pub target: bool,
}

/// Whether to colour: what was asked for, else on a terminal unless NO_COLOR is set and not empty (no-color.org).
pub fn coloured(asked: ColorChoice, terminal: bool, no_color: Option<&OsStr>) -> bool {
    match asked {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => terminal && no_color.is_none_or(OsStr::is_empty),
    }
}

/// The runs one after another, ending in a line break: targets on green and the rest dim, or targets between « and ».
pub fn paint(runs: &[Run<'_>], colour: bool) -> String {
    let mut out = String::new();
    for run in runs.iter().filter(|run| !run.text.is_empty()) {
        let (before, after) = match (colour, run.target) {
            (true, true) => (TARGET, RESET),
            (true, false) => (OTHER, RESET),
            (false, true) => ("«", "»"),
            (false, false) => ("", ""),
        };
        // A background that is on at a line break would fill the rest of the terminal's line.
        let line_break = if colour { format!("↵{after}\n{before}") } else { "↵\n".to_owned() };
        out.push_str(before);
        run.text.chars().for_each(|c| show(c, &line_break, &mut out));
        out.push_str(after);
    }
    out.push('\n');
    out
}

/// Writes `c` so that it is seen: control characters as Unicode's pictures of them, and those that turn or hide text as their code.
fn show(c: char, line_break: &str, out: &mut String) {
    match c {
        '\n' => out.push_str(line_break),
        '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + u32::from(c))),
        '\u{7f}' => out.push('␡'),
        '\u{80}'..='\u{9f}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{2069}'
        | '\u{feff}' => {
            out.push_str(&format!("<U+{:04X}>", u32::from(c)));
        }
        c => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: [Run<'_>; 3] = [
        Run { text: "user\nhi", target: false },
        Run { text: "a\nb", target: true },
        Run { text: "\n", target: false },
    ];

    #[test]
    fn targets_stand_between_marks_without_colours() {
        assert_eq!(paint(&RUNS, false), "user↵\nhi«a↵\nb»↵\n\n");
    }

    #[test]
    fn colours_are_off_at_every_line_break() {
        let expected = "\x1b[2muser↵\x1b[0m\n\x1b[2mhi\x1b[0m\x1b[30;42ma↵\x1b[0m\n\x1b[30;42mb\x1b[0m\x1b[2m↵\x1b[0m\n\x1b[2m\x1b[0m\n";
        assert_eq!(paint(&RUNS, true), expected);
    }

    #[test]
    fn what_controls_a_terminal_is_shown_not_sent() {
        let run = Run { text: "a\x1b[31m\t\r\x7f\u{9b}\u{202e}\u{feff}é", target: false };
        assert_eq!(paint(&[run], false), "a␛[31m␉␍␡<U+009B><U+202E><U+FEFF>é\n");
    }

    #[test]
    fn colours_follow_the_argument_the_terminal_and_no_color() {
        let no_color = Some(OsStr::new("1"));
        assert!(coloured(ColorChoice::Always, false, no_color));
        assert!(!coloured(ColorChoice::Never, true, None));
        assert!(coloured(ColorChoice::Auto, true, None));
        assert!(coloured(ColorChoice::Auto, true, Some(OsStr::new(""))));
        assert!(!coloured(ColorChoice::Auto, true, no_color));
        assert!(!coloured(ColorChoice::Auto, false, None));
    }
}
