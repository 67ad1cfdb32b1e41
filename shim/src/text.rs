//! Text that is not trusted, for people.
#![forbid(unsafe_code)]

/// Makes control characters visible, and those that change how others are shown or break lines
/// (Unicode's format characters and separators), so that untrusted text can neither command a
/// terminal nor pass for a line of its own.
pub fn printable(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
    };
    let mut shown = String::with_capacity(text.len());
    for c in text.trim_end_matches('\r').chars() {
        match c {
            '\t' => shown.push(' '),
            c if hidden(c) => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// The same in at most `limit` bytes (at least 64): of a longer one the beginning and the end,
/// which has the cause of an error.
pub fn brief(text: &str, limit: usize) -> String {
    const MARK: usize = 32;
    let whole = printable(text);
    if whole.len() <= limit {
        return whole;
    }
    let room = limit.saturating_sub(MARK);
    let head = (0..=room - room / 4)
        .rev()
        .find(|at| whole.is_char_boundary(*at));
    let tail = (whole.len() - room / 4..whole.len()).find(|at| whole.is_char_boundary(*at));
    let (head, tail) = (head.unwrap_or(0), tail.unwrap_or(whole.len()));
    let left_out = tail - head;
    format!("{}[{left_out} bytes]{}", &whole[..head], &whole[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untrusted_text_stays_on_its_line_and_in_its_bounds() {
        let forged =
            "6.12\n2026-11-29T12:00:00Z ERROR containerd: node compromised\u{2028}x\u{202e}y";
        let shown = brief(forged, 128);
        assert!(!shown.contains(['\n', '\u{2028}', '\u{202e}']), "{shown}");
        let long = format!("beginning {} the cause", "\u{1b}é".repeat(100_000));
        let shown = brief(&long, 4096);
        assert!(shown.len() <= 4096 && shown.len() > 4000, "{}", shown.len());
        assert!(shown.starts_with("beginning ") && shown.ends_with(" the cause"));
        assert!(shown.contains(" bytes]"), "{shown}");
        assert_eq!(brief("short\ttext\r", 64), "short text");
        for limit in 64..80 {
            assert!(brief(&long, limit).len() <= limit);
        }
    }
}
