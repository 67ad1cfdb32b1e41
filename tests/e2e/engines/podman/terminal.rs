//! Podman at a terminal, as people use it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use bulkhead_tests::{Host, PATIENCE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{BOTH, Podman, nothing_left};

/// A terminal of 33 rows and 99 columns with a command of Podman's at its other end.
pub struct Terminal {
    master: File,
    child: Child,
    output: Receiver<Vec<u8>>,
    /// What has come and was not asked for yet.
    seen: String,
}

impl Terminal {
    pub fn start(podman: &Podman, words: &[&str]) -> Terminal {
        let pty = nix::pty::openpty(None, None).expect("a terminal");
        linux::terminal::resize(pty.master.as_fd(), 33, 99).expect("a terminal");
        let copy = || Stdio::from(pty.slave.try_clone().expect("a descriptor"));
        let mut command = podman.command(words);
        command.stdin(copy()).stdout(copy()).stderr(copy());
        let child = command.spawn().expect("podman is installed");
        let (sender, output) = channel();
        let mut reader = File::from(pty.master.try_clone().expect("a descriptor"));
        thread::spawn(move || {
            let mut bytes = [0; 256];
            // It ends with an error when nobody has the other end any more.
            while let Ok(count) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Terminal {
            master: pty.master.into(),
            child,
            output,
            seen: String::new(),
        }
    }

    /// Waits for `word`, and forgets what came up to its end.
    #[track_caller]
    pub fn read(&mut self, word: &str) {
        while !self.seen.contains(word) {
            let bytes = self.output.recv_timeout(PATIENCE);
            let bytes = bytes.unwrap_or_else(|_| panic!("{word:?} is not in {:?}", self.seen));
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        let at = self.seen.find(word).expect("found above") + word.len();
        self.seen.drain(..at);
    }

    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("writable");
    }

    /// As a window does: the kernel's own signal is for whose controlling terminal it is.
    pub fn resize(&self, rows: u16, columns: u16) {
        linux::terminal::resize(self.master.as_fd(), rows, columns).expect("a terminal");
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        kill(pid, Signal::SIGWINCH).expect("it runs");
    }

    /// Waits for the command's end: its exit status.
    #[track_caller]
    pub fn end(mut self) -> Option<i32> {
        loop {
            match self.output.recv_timeout(PATIENCE) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(error) => panic!("{error}: it goes on after {:?}", self.seen),
            }
        }
        self.child.wait().expect("our own child").code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has been waited for, unless a test has failed.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[test]
fn a_shell_at_a_terminal_has_its_size_and_its_keys() {
    let podman = Podman::get();
    let host = Host::now();
    for runtime in BOTH {
        let words = "run --rm --interactive --tty --network none busybox sh";
        let words: Vec<&str> = words.split(' ').collect();
        let mut terminal = Terminal::start(podman, &[&["--runtime", runtime][..], &words].concat());
        terminal.read("# ");
        // What is typed comes back too: the answers are not in it.
        terminal.write("stty size; tty\n");
        terminal.read("33 99\r\n/dev/pts/0\r\n");
        terminal.resize(44, 111);
        terminal.write("until stty size | grep 44; do sleep 0.1; done\n");
        terminal.read("44 111\r\n");
        terminal.write("echo $((40 + 2)); sleep 1000\n");
        terminal.read("\n42\r\n");
        terminal.write("\x03");
        terminal.read("^C");
        terminal.write("exit $(($? + 5))\n");
        assert_eq!(terminal.end(), Some(135), "{runtime}");
    }
    nothing_left(&host);
}
