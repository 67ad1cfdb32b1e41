//! Names that become path components.

/// Longest id, in bytes: with the state directory and a suffix it must fit a socket's address and a cgroup's name.
pub const MAX_ID: usize = 128;

/// An id that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing at all.
    #[error("the {0} is empty")]
    Empty(&'static str),
    /// Longer than [`MAX_ID`].
    #[error("the {what} has {length} bytes, {MAX_ID} are allowed")]
    TooLong {
        /// Which id.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// A character outside of the alphabet.
    #[error(
        "the {what} {id:?} has the character {character:?}; letters, digits and . _ + - are allowed"
    )]
    Character {
        /// Which id.
        what: &'static str,
        /// The id.
        id: String,
        /// The first offending character.
        character: char,
    },
    /// `.`, `..`, or hidden.
    #[error("the {what} {id:?} begins with a dot")]
    Dot {
        /// Which id.
        what: &'static str,
        /// The id.
        id: String,
    },
}

/// Checks an id: `[A-Za-z0-9_+-][A-Za-z0-9._+-]*`, at most [`MAX_ID`] bytes. `what` names it in the error.
pub fn check(what: &'static str, id: &str) -> Result<(), Error> {
    if id.is_empty() {
        return Err(Error::Empty(what));
    }
    if id.len() > MAX_ID {
        let length = id.len();
        return Err(Error::TooLong { what, length });
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '+' | '-');
    if let Some(character) = id.chars().find(|c| !allowed(*c)) {
        let id = id.into();
        return Err(Error::Character {
            what,
            id,
            character,
        });
    }
    // `.` and `..` are not names, and the state directory keeps its own files under dotted ones.
    if id.starts_with('.') {
        let id = id.into();
        return Err(Error::Dot { what, id });
    }
    Ok(())
}

/// Longest host name that Linux takes, in bytes (sethostname(2)).
const MAX_HOSTNAME: usize = 64;

/// The host name of a pod that was given none: its id, cut to what Linux takes. No dot or hyphen is left at the cut, where no
/// host name has one (kubelet cuts pods' names in the same way).
pub fn hostname(id: &str) -> &str {
    match id.get(..MAX_HOSTNAME) {
        Some(cut) if cut.len() < id.len() => cut.trim_end_matches(['.', '-']),
        _ => id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_single_plain_path_components() {
        for good in ["a", "A-1_b+c.d", "0", &"x".repeat(MAX_ID)] {
            check("id", good).unwrap();
        }
        for bad in [
            "",
            ".",
            "..",
            ".claims",
            "a/b",
            "a b",
            "ä",
            "a\0",
            "a\n",
            &"x".repeat(129),
        ] {
            check("id", bad).unwrap_err();
        }
        assert_eq!(
            check("id", "a/b").unwrap_err().to_string(),
            "the id \"a/b\" has the character '/'; letters, digits and . _ + - are allowed"
        );
    }

    #[test]
    fn a_long_id_is_cut_to_a_host_name() {
        for length in [1, 63, 64] {
            let id = "x".repeat(length);
            assert_eq!(hostname(&id), id);
        }
        for length in [65, 76, MAX_ID] {
            assert_eq!(hostname(&"x".repeat(length)), "x".repeat(64));
        }
        let id = format!("{}-.-{}", "x".repeat(61), "y".repeat(12));
        assert_eq!(hostname(&id), "x".repeat(61));
        assert_eq!(hostname("a-"), "a-");
    }
}
