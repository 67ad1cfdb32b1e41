//! The user's terminal: raw while a container has one, and as it was on every way out.

use std::{io::stdin, os::fd::AsFd, sync::Mutex};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// What to go back to.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Makes the terminal on standard input raw; `false` when there is none.
pub fn make_raw() -> bool {
    let Ok(before) = tcgetattr(stdin()) else {
        return false;
    };
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    if let Ok(mut saved) = BEFORE.lock() {
        *saved = Some(before);
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        hook(info);
    }));
    tcsetattr(stdin(), SetArg::TCSANOW, &raw).is_ok()
}

/// Restores it, if it was made raw.
pub fn restore() {
    let saved = BEFORE.lock().ok().and_then(|mut saved| saved.take());
    if let Some(before) = saved {
        // A terminal that hung up has nothing to restore.
        let _ = tcsetattr(stdin(), SetArg::TCSANOW, &before);
    }
}

/// Rows and columns of the first of the standard streams that is a terminal.
pub fn size() -> Option<(u16, u16)> {
    let (input, output, error) = (stdin(), std::io::stdout(), std::io::stderr());
    [input.as_fd(), output.as_fd(), error.as_fd()]
        .into_iter()
        .find_map(|fd| {
            let size = linux::terminal::size(fd).ok()?;
            (size.0 > 0).then_some(size)
        })
}
