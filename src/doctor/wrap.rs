//! Lines that fit a terminal.

/// The widest line of the tables.
const WIDTH: usize = 110;

/// The text after `indent` spaces on every line but the first, broken between
/// words; the first line is taken to begin there already.
pub fn wrap(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut column = indent;
    for word in text.split(' ') {
        let length = word.chars().count();
        if column > indent && column + 1 + length > WIDTH {
            lines.push('\n');
            lines.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if column > indent {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += length;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_broken_between_words_and_loses_none() {
        let text = "word ".repeat(60);
        let wrapped = wrap(text.trim(), 30);
        assert!(wrapped.lines().skip(1).all(|line| line.starts_with(&" ".repeat(30)) && line.len() <= WIDTH));
        assert!(wrapped.lines().next().is_some_and(|line| line.len() <= WIDTH - 30));
        let words = |text: &str| text.split_whitespace().count();
        assert_eq!(words(&wrapped), 60);
        assert_eq!(wrap("short", 30), "short");
        assert_eq!(wrap("", 30), "");
    }
}
