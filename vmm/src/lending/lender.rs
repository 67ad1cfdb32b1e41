//! The VMM's end: it makes lent pages the pod's own when the fs process needs them.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use thiserror::Error;

use super::{ANSWER, MAX_RUNS, QUESTION, decode_question, encode_runs};
use crate::devices::virtio::net::Pairs;
use crate::memory::Loan;
use crate::vcpu::Vcpus;

/// The fs process is not lent to any more.
#[derive(Debug, Error)]
pub enum LenderError {
    /// The first packet.
    #[error("the fs process cannot be told what the template lends, {0} pieces")]
    Tell(usize, #[source] io::Error),
    /// It does not keep to the protocol.
    #[error("the fs process asks for lent pages by a packet of {0} bytes that is no question")]
    NoQuestion(usize),
    /// Its socket.
    #[error("the fs process's questions for lent pages cannot be read or answered")]
    Socket(#[source] io::Error),
}

/// Answers the fs process.
pub struct Lender {
    socket: OwnedFd,
    loan: Loan,
    /// Of all network devices: their threads write to guest memory.
    pairs: Pairs,
    questions: u64,
}

impl Lender {
    /// Tells the fs process what is lent, before it hears of the memory.
    ///
    /// # Errors
    /// It has gone, or is not told so much.
    pub fn new(socket: OwnedFd, loan: Loan, pairs: Pairs) -> Result<Lender, LenderError> {
        let mut lent = loan.lock();
        // What was made own since has made more of them.
        lent.simplify(MAX_RUNS);
        let runs = lent.runs();
        drop(lent);
        let tell = |source| LenderError::Tell(runs.len(), source);
        let flags = MsgFlags::MSG_NOSIGNAL;
        send(socket.as_raw_fd(), &encode_runs(&runs), flags).map_err(|error| tell(error.into()))?;
        Ok(Lender {
            socket,
            loan,
            pairs,
            questions: 0,
        })
    }

    /// Answers a question, if there is one; false when the fs process has gone.
    ///
    /// # Errors
    /// It must not be answered any more.
    pub fn answer(&mut self, vcpus: &Vcpus) -> Result<bool, LenderError> {
        let mut packet = [0; QUESTION + 1];
        let socket = self.socket.as_raw_fd();
        let failed = |error: Errno| LenderError::Socket(error.into());
        // It stays where it is until it can be answered.
        let look = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        let count = match recv(socket, &mut packet, look) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(false),
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(true),
            Err(error) => return Err(failed(error)),
        };
        let question = decode_question(&packet[..count]);
        let (address, length) = question.ok_or(LenderError::NoQuestion(count))?;
        if !self.own(address..address.saturating_add(length), vcpus) {
            return Ok(true);
        }
        self.questions += 1;
        recv(socket, &mut packet, MsgFlags::MSG_DONTWAIT).map_err(failed)?;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(socket, &[ANSWER], flags) {
            Ok(_) => Ok(true),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// How often the fs process has asked, and how many bytes are lent still.
    pub fn summary(&self) -> (u64, u64) {
        let runs = self.loan.lock().runs();
        (self.questions, runs.iter().map(|(_, length)| length).sum())
    }

    /// Makes pages the pod's own while nobody writes to guest memory but this thread: no vCPU, and
    /// no thread of a network device. What devices do on the thread that starts them changes no
    /// memory of the guest's. False: such a thread is in the middle of something, and others are not to wait for what the
    /// guest makes of that.
    fn own(&self, range: Range<u64>, vcpus: &Vcpus) -> bool {
        if !self.loan.lock().has(&range) {
            return true;
        }
        let still: Option<Vec<_>> = self.pairs.iter().map(|pair| pair.try_lock().ok()).collect();
        if still.is_some() {
            vcpus.hold(|| self.loan.lock().own(range));
        }
        still.is_some()
    }
}

impl std::os::fd::AsRawFd for Lender {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vm_memory::{GuestMemory as _, GuestMemoryRegion};

    use super::*;
    use crate::lending::{decode_runs, encode_question};
    use crate::memory::Memory;
    use crate::vcpu::Buses;

    const START: u64 = 0x20_0000;
    const LENGTH: u64 = 4 * 0x1_0000;
    const BLOCK: u64 = 0x1_0000;

    struct Pod {
        memory: Memory,
        lender: Lender,
        vcpus: Vcpus,
        fs: OwnedFd,
    }

    impl Pod {
        fn new() -> Pod {
            let template = tempfile::tempfile().unwrap();
            template.write_all_at(&[7; LENGTH as usize], START).unwrap();
            let memory = Memory::new(64 << 20).unwrap();
            let region = memory.ram().iter().next().unwrap();
            let mut lent = memory.loan().lock();
            lent.lend(region, (START, LENGTH), &template, START)
                .unwrap();
            drop(lent);
            let (ours, fs) = linux::packet::pair().unwrap();
            let nobody = (Vec::new(), Arc::default(), Arc::new(Buses::default()));
            let (fds, stats, buses) = nobody;
            let vcpus = Vcpus::start(fds, stats, buses, Arc::new(|_| ())).unwrap();
            let lender = Lender::new(ours, memory.loan().clone(), Pairs::new()).unwrap();
            Pod {
                memory,
                lender,
                vcpus,
                fs,
            }
        }

        fn hear(&self) -> Option<Vec<u8>> {
            let mut packet = [0; 1024];
            let heard = recv(self.fs.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT);
            heard.ok().map(|count| packet[..count].to_vec())
        }

        fn say(&self, packet: &[u8]) {
            send(self.fs.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
        }

        fn answer(&mut self) -> Result<bool, LenderError> {
            self.lender.answer(&self.vcpus)
        }

        /// What the fs process sees there.
        fn seen(&self, address: u64) -> u8 {
            let region = self.memory.ram().iter().next().unwrap();
            let file: &File = region.file_offset().unwrap().file();
            let mut byte = [0];
            file.read_exact_at(&mut byte, address).unwrap();
            byte[0]
        }
    }

    #[test]
    fn the_fs_process_hears_what_is_lent_and_gets_what_it_asks_for() {
        let mut pod = Pod::new();
        let runs = decode_runs(&pod.hear().unwrap()).unwrap();
        assert_eq!(runs, [(START, LENGTH)]);
        // Nothing was asked.
        assert!(pod.answer().unwrap());
        assert_eq!(pod.hear(), None);
        pod.say(&encode_question(START + BLOCK, BLOCK));
        assert!(pod.answer().unwrap());
        assert_eq!(pod.hear(), Some(vec![ANSWER]));
        let seen = [START, START + BLOCK, START + 2 * BLOCK].map(|at| pod.seen(at));
        assert_eq!(seen, [0, 7, 0]);
        // What nothing is lent of is the pod's own already.
        for question in [
            encode_question(START + BLOCK, 4096),
            encode_question(0, 4096),
            encode_question(1 << 62, BLOCK),
            encode_question(u64::MAX - 8191, 4096),
        ] {
            pod.say(&question);
            assert!(pod.answer().unwrap());
            assert_eq!(pod.hear(), Some(vec![ANSWER]));
        }
        let rest = [(START, BLOCK), (START + 2 * BLOCK, 2 * BLOCK)];
        assert_eq!(pod.memory.loan().lock().runs(), rest);
    }

    #[test]
    fn who_does_not_ask_a_question_gets_no_answer() {
        let all = encode_question(0, u64::MAX - 4095);
        for packet in [
            &[1; 15][..],
            &[0; 16],
            &[1; 16],
            &[0xff; 17],
            &[0; 900],
            &all,
        ] {
            let mut pod = Pod::new();
            pod.say(packet);
            let error = pod.answer().unwrap_err();
            assert!(matches!(error, LenderError::NoQuestion(_)), "{error}");
            assert_eq!(pod.memory.loan().lock().runs(), [(START, LENGTH)]);
        }
    }

    #[test]
    fn an_fs_process_that_has_gone_is_no_error() {
        let mut pod = Pod::new();
        pod.say(&encode_question(START, 4096));
        pod.fs = File::open("/dev/null").unwrap().into();
        // The question may be read still; its answer finds nobody.
        while pod.answer().unwrap() {}
    }

    #[test]
    fn answers_that_nobody_takes_do_not_stop_the_machine() {
        let mut pod = Pod::new();
        let asked = loop {
            let flags = MsgFlags::MSG_DONTWAIT;
            let question = encode_question(0, 4096);
            if send(pod.fs.as_raw_fd(), &question, flags).is_err() {
                match pod.answer() {
                    Ok(alive) => assert!(alive),
                    Err(error) => break error,
                }
            }
        };
        assert!(matches!(asked, LenderError::Socket(_)), "{asked}");
    }
}
