//! An error for people.

use std::error::Error;

/// An error with its causes, on one line. A cause that its error has quoted already is not repeated.
pub fn line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    // Some of it may be a stranger's, and a terminal reads it.
    text.replace(char::is_control, " ")
}
