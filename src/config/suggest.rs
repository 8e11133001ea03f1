//! "Did you mean": the known word nearest to one that was typed.

/// `did you mean "workers"?`, or else the list of what there is.
pub fn did_you_mean(typed: &str, known: &[&str], otherwise: &str) -> String {
    if let Some(word) = nearest(typed, known) {
        return format!("did you mean \"{word}\"?");
    }
    otherwise.to_string()
}

/// The same for the name of a thing of this kind: `no listener "wbe"`, and on a
/// line of its own the nearest one, or all that there are.
pub fn no_such(kind: &str, typed: &str, known: &[&str]) -> String {
    let otherwise = match known {
        [] => "there is none".to_string(),
        known => format!("there are: {}", known.join(", ")),
    };
    format!("no {kind} \"{typed}\"\n  {}", did_you_mean(typed, known, &otherwise))
}

/// The nearest word, at most two edits away; one for words of up to three
/// letters, where two make another word of it (tcp and udp).
fn nearest<'k>(typed: &str, known: &[&'k str]) -> Option<&'k str> {
    let length = typed.chars().count();
    let allowed = if length <= 3 { 1 } else { 2 };
    known
        .iter()
        .filter(|word| word.chars().count().abs_diff(length) <= allowed)
        .map(|word| (distance(&typed.to_lowercase(), &word.to_lowercase()), *word))
        .filter(|(edits, word)| *edits <= allowed && *edits < word.chars().count())
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, word)| word)
}

/// Edits that turn `a` into `b`: insert, delete, replace, or swap neighbours.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = last[j] + usize::from(a[i] != b[j]);
            let mut edits = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                edits = edits.min(before[j - 1] + 1);
            }
            row.push(edits);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_finger_are_near() {
        let known = ["workers", "user", "group", "tcp"];
        assert_eq!(nearest("worker", &known), Some("workers"));
        assert_eq!(nearest("wrokres", &known), Some("workers"));
        assert_eq!(nearest("Gruop", &known), Some("group"));
        assert_eq!(nearest("tpc", &known), Some("tcp"));
        assert_eq!(nearest("timeot", &["timeouts", "timeout"]), Some("timeout"));
        assert_eq!(nearest("threads", &known), None);
        assert_eq!(nearest("", &known), None);
    }

    #[test]
    fn a_short_word_is_not_near_everything() {
        assert_eq!(nearest("c", &["a", "b"]), None);
        assert_eq!(nearest("x1", &["y2"]), None);
        assert_eq!(nearest("udp", &["tcp"]), None);
    }
}
