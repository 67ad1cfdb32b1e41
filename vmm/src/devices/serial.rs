//! A serial console for debugging: the 16550 of vm-superio, output only.

use std::fs::File;
use std::io;

use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::irq::{Interrupt, IrqFd};

/// An interrupt line as vm-superio wants it.
struct Line(IrqFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise()
    }
}

/// The console. What the output does not take at once is dropped: a debugging aid must not stop the guest.
pub struct SerialConsole {
    uart: Serial<Line, vm_superio::serial::NoEvents, NeverBlocking>,
}

/// A file whose writes succeed, whether or not all bytes found room.
struct NeverBlocking(File);

impl io::Write for NeverBlocking {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self.0.write(data) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            _ => Ok(data.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialConsole {
    /// A console that writes to `output`, which is non-blocking, and raises `line`.
    pub fn new(output: File, line: IrqFd) -> SerialConsole {
        SerialConsole {
            uart: Serial::new(Line(line), NeverBlocking(output)),
        }
    }
}

impl BusDevice for SerialConsole {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The only error is a full loopback buffer, the guest's own doing.
            let _ = self.uart.write(offset, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn bytes_come_out_and_a_full_pipe_does_not_block() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let line = IrqFd::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut console = SerialConsole::new(File::from(writer), line);
        for _ in 0..1 << 17 {
            console.write(0, b"x");
        }
        let mut first = [0; 16];
        File::from(reader).read_exact(&mut first).unwrap();
        assert_eq!(first, [b'x'; 16]);
    }

    #[test]
    fn wide_accesses_are_ignored() {
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        let line = IrqFd::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut console = SerialConsole::new(File::from(writer), line);
        let mut data = [0; 4];
        console.write(3, &[0xff; 4]);
        console.read(3, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
