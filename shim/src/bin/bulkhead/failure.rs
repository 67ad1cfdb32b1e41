//! The one line that says why Bulkhead failed, and its exit code (docs/operations.md has the table).

use std::error::Error;

pub use bulkhead_shim::error::line;

/// Bulkhead itself failed.
pub const OWN: u8 = 125;

/// What to print, and how to exit.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: u8,
    line: String,
    details: Vec<String>,
}

impl Failure {
    /// A failure of ours.
    pub fn new(line: impl Into<String>) -> Failure {
        Failure {
            code: OWN,
            line: line.into(),
            details: Vec::new(),
        }
    }

    /// With another code.
    pub fn with_code(mut self, code: u8) -> Failure {
        self.code = code;
        self
    }

    /// With lines that come after the one, indented: a guest's last words.
    pub fn with_details(mut self, details: &[String]) -> Failure {
        self.details = details.to_vec();
        self
    }

    /// Why, in one line.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// To standard error.
    pub fn print(&self) {
        use std::io::Write;
        let mut text = format!("bulkhead: {}\n", self.line);
        for detail in &self.details {
            text += &format!("  | {detail}\n");
        }
        // There is nowhere to report a closed standard error to.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::new(line(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read /x")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_follow_on_the_same_line() {
        let error = Outer(std::io::Error::from_raw_os_error(2));
        assert_eq!(
            line(&error),
            "cannot read /x: No such file or directory (os error 2)"
        );
    }
}
