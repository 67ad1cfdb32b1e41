//! What a change to a small text file would be, as `diff -u` shows it.

use std::{fmt::Write, path::Path};

/// Lines around the change.
const CONTEXT: usize = 3;

/// The change from `old` to `new` as one hunk; `None`: there is no such file.
pub fn unified(path: &Path, old: Option<&str>, new: Option<&str>) -> String {
    let lines = |text: Option<&str>| -> Vec<String> {
        let text = text.unwrap_or_default().split_inclusive('\n');
        text.map(String::from).collect()
    };
    let (before, after) = (lines(old), lines(new));
    let shorter = before.len().min(after.len());
    let same = |one: &[String], other: &[String]| one == other;
    let head = (0..shorter)
        .take_while(|&at| before[at] == after[at])
        .count();
    let tail = (1..=shorter - head)
        .take_while(|&back| same(&before[before.len() - back..], &after[after.len() - back..]))
        .count();
    let first = head.saturating_sub(CONTEXT);
    let last = tail.saturating_sub(CONTEXT);
    let name = |text: Option<&str>| match text {
        Some(_) => path.display().to_string(),
        None => "/dev/null".into(),
    };
    let mut out = format!("--- {}\n+++ {}\n", name(old), name(new));
    let place = |lines: &[String]| {
        let count = lines.len() - last - first;
        // A hunk without lines is said to come after the line before it.
        format!("{},{count}", first + usize::from(count > 0))
    };
    let _ = writeln!(out, "@@ -{} +{} @@", place(&before), place(&after));
    let mut add = |mark: char, lines: &[String]| {
        for line in lines {
            let _ = write!(out, "{mark}{line}");
            if !line.ends_with('\n') {
                out.push_str("\n\\ No newline at end of file\n");
            }
        }
    };
    add(' ', &before[first..head]);
    add('-', &before[head..before.len() - tail]);
    add('+', &after[head..after.len() - tail]);
    add(' ', &before[before.len() - tail..before.len() - last]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What patch(1) and the reader need: the same text, one hunk.
    fn diff(old: Option<&str>, new: Option<&str>) -> String {
        unified(Path::new("/f"), old, new)
    }

    #[test]
    fn an_addition_has_three_lines_around_it() {
        assert_eq!(
            diff(Some("1\n2\n3\n4\n5\n"), Some("1\n2\n3\n4\nx\n5\n")),
            "--- /f\n+++ /f\n@@ -2,4 +2,5 @@\n 2\n 3\n 4\n+x\n 5\n"
        );
    }

    #[test]
    fn a_file_that_comes_or_goes_is_compared_with_none() {
        assert_eq!(
            diff(None, Some("a\n")),
            "--- /dev/null\n+++ /f\n@@ -0,0 +1,1 @@\n+a\n"
        );
        assert_eq!(
            diff(Some("a\n"), None),
            "--- /f\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-a\n"
        );
    }

    #[test]
    fn a_last_line_without_a_newline_is_marked() {
        assert_eq!(
            diff(Some("a"), Some("a\nb\n")),
            "--- /f\n+++ /f\n@@ -1,1 +1,2 @@\n-a\n\\ No newline at end of file\n+a\n+b\n"
        );
    }

    #[test]
    fn repeated_lines_are_counted_once() {
        assert_eq!(
            diff(Some("a\na\n"), Some("a\na\na\n")),
            "--- /f\n+++ /f\n@@ -1,2 +1,3 @@\n a\n a\n+a\n"
        );
    }
}
