//! Comments of Java, JavaScript, C and C++.

/// `code` with a space for each comment. Quoted text is left alone; an unclosed quote or comment is no quote or comment.
pub fn without_comments(code: &str) -> String {
    let bytes = code.as_bytes();
    // Closers that were looked for in vain, so that no search is made twice: time stays linear.
    let (mut unclosed_comment, mut unclosed_quote) = (false, [false; 2]);
    let (mut out, mut kept, mut at) = (String::with_capacity(code.len()), 0, 0);
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'/', Some(b'/')) => {
                out.push_str(&code[kept..at]);
                out.push(' ');
                at = code[at..].find('\n').map_or(bytes.len(), |end| at + end);
                kept = at;
            }
            (b'/', Some(b'*')) if !unclosed_comment => match code[at + 2..].find("*/") {
                Some(end) => {
                    out.push_str(&code[kept..at]);
                    out.push(' ');
                    at += 2 + end + 2;
                    kept = at;
                }
                None => unclosed_comment = true,
            },
            (quote @ (b'\'' | b'"'), _) => {
                let unclosed = &mut unclosed_quote[usize::from(quote == b'"')];
                let end = if *unclosed { None } else { quote_end(bytes, at + 1, quote) };
                // After a search in vain every later quote of the kind is an escaped one, from which a search fails as well.
                *unclosed = end.is_none();
                at = end.unwrap_or(at + 1);
            }
            _ => at += 1,
        }
    }
    out.push_str(&code[kept..]);
    out
}

/// The byte after the quote that closes the text from `at` on.
fn quote_end(bytes: &[u8], mut at: usize, quote: u8) -> Option<usize> {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_go_and_quotes_stay() {
        for (code, wanted) in [
            ("a; // b\nc;", "a;  \nc;"),
            ("a /* b\n */ c /**/ d", "a   c   d"),
            ("\"//\" + '/*' + \"\\\"//\" // x", "\"//\" + '/*' + \"\\\"//\"  "),
            ("it's // open", "it's  "),
            ("/* open // é", "/* open  "),
            ("'\\", "'\\"),
            ("\"a\nb\" // c", "\"a\nb\"  "),
        ] {
            assert_eq!(without_comments(code), wanted, "{code}");
        }
    }
}
