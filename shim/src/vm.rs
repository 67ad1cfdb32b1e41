//! The machine: `bulkhead-vmm run`, its requests and its events.
//!
//! ```text
//! starting ── Running ──► running ── Ended ──► gone (process collected)
//!    │                       │
//!    └────────── Failed, or dead without a word ──► gone
//! ```

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
};

use bulkhead_vmm_config::{
    Event, Fd, FsDevice, GuestEnd, NetDevice, PortOffer, RateLimit, Request, SerialConsole, Stamp,
    VmConfig, VmStats, WIRE_VERSION,
};
use tokio::sync::{oneshot, watch};

use crate::{
    config, control,
    error::line,
    ledger::Ledger,
    logs::printable,
    network::Device,
    peer::{self, Peer, Place},
    sys::process::Death,
};

/// Why the machine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started.
    #[error(transparent)]
    Peer(#[from] peer::Error),
    /// The control socket broke.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The machine is gone.
    #[error("{0}")]
    Gone(End),
    /// It said no.
    #[error("the virtual machine refused {request}: {reason}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Its words.
        reason: String,
    },
}

/// How many of a guest's last console lines an error carries.
const SHOWN: usize = 20;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended.
    Guest {
        /// How.
        end: GuestEnd,
        /// Its last console lines, made printable.
        console: Vec<String>,
        /// Counters.
        stats: Box<VmStats>,
    },
    /// The VMM said why it could not go on.
    Failed {
        /// Its words.
        reason: String,
    },
    /// The VMM died without a word.
    Died {
        /// How, when we could collect it.
        death: Option<Death>,
        /// The last log line that tells of trouble.
        trouble: Option<String>,
        /// Its last log lines.
        log: Vec<String>,
    },
}

impl End {
    /// The last lines of the guest's console, or of the VMM's log.
    pub fn last_lines(&self) -> &[String] {
        match self {
            End::Guest { console, .. } => &console[console.len().saturating_sub(SHOWN)..],
            End::Failed { .. } => &[],
            End::Died { log, .. } => log,
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Guest { end, console, .. } => {
                f.write_str(match end {
                    GuestEnd::PowerOff => "the guest powered off",
                    GuestEnd::Reboot => "the guest rebooted",
                    GuestEnd::Panic => "the guest's kernel panicked",
                    GuestEnd::TripleFault => "the guest stopped by a triple fault",
                    GuestEnd::Stopped => "the virtual machine was stopped",
                    GuestEnd::KvmError => "KVM could not go on running the guest",
                })?;
                let telling = console
                    .iter()
                    .rev()
                    .find(|line| line.contains("Kernel panic"));
                match telling.or(console.last()) {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
            End::Failed { reason } => write!(f, "{reason}"),
            End::Died { death, trouble, .. } => {
                f.write_str("the virtual machine's process died")?;
                if let Some(death) = death {
                    write!(f, " by {death}")?;
                }
                match trouble {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// A network interface of the machine.
#[derive(Debug)]
pub struct Nic {
    /// Queues of its tap.
    pub taps: Vec<OwnedFd>,
    /// Its own address.
    pub mac: [u8; 6],
    /// Largest packet in bytes.
    pub mtu: u16,
    /// What the guest may receive.
    pub receive: RateLimit,
    /// What the guest may send.
    pub transmit: RateLimit,
}

impl Nic {
    /// On the taps of an interface of the pod's namespace.
    pub fn new(device: Device, limits: &config::Network) -> Nic {
        Nic {
            taps: device.taps,
            mac: device.mac,
            // 65535 is virtio's largest (VIRTIO 1.2 §5.1.4).
            mtu: device.mtu.try_into().unwrap_or(u16::MAX),
            receive: limits.receive.into(),
            transmit: limits.transmit.into(),
        }
    }

    fn config(&self, mut index: impl FnMut(i32) -> Fd) -> NetDevice {
        NetDevice {
            taps: self.taps.iter().map(|tap| index(tap.as_raw_fd())).collect(),
            mac: self.mac,
            mtu: self.mtu,
            receive_limit: self.receive,
            transmit_limit: self.transmit,
        }
    }
}

/// What the machine is made of.
pub struct Hardware<'a> {
    /// 1 to 32.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
    /// `/dev/kvm`.
    pub kvm: BorrowedFd<'a>,
    /// vmlinux.
    pub kernel: BorrowedFd<'a>,
    /// The initial RAM file system.
    pub initrd: BorrowedFd<'a>,
    /// Appended to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// (port, end of a socketpair) that the guest may dial from the start.
    pub ports: Vec<(u32, OwnedFd)>,
    /// Front end of the share: (tag, vhost-user socket, request queues).
    pub share: (String, OwnedFd, u32),
    /// Network interfaces.
    pub net: Vec<Nic>,
    /// Places for more of them.
    pub net_slots: u32,
    /// Where a debugging console goes.
    pub serial: Option<BorrowedFd<'a>>,
    /// The user and the group that the process becomes.
    pub uid: u32,
}

type Answer = oneshot::Sender<Result<Option<VmStats>, String>>;

#[derive(Debug, Default)]
struct Shared {
    stamps: Vec<Stamp>,
    waiting: VecDeque<Answer>,
}

/// A request's turn to be answered. It is given up unless the request has been sent, whether that failed or was not waited for: no
/// answer will come, and the next one would be taken for it.
struct Turn<'a>(&'a Mutex<Shared>);

impl Turn<'_> {
    /// After all others. Only who holds `Vm::sending` may have one.
    fn last(shared: &Mutex<Shared>, answer: Answer) -> Turn<'_> {
        locked(shared).waiting.push_back(answer);
        Turn(shared)
    }

    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Still the last, unless a broken machine has answered more than it was asked: then there is none.
        locked(self.0).waiting.pop_back();
    }
}

fn locked(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().expect("no panic while it is held")
}

/// A machine.
#[derive(Debug)]
pub struct Vm {
    peer: Arc<Peer>,
    shared: Arc<Mutex<Shared>>,
    end: watch::Receiver<Option<End>>,
    /// Keeps the order of packets that of `Shared::waiting`.
    sending: tokio::sync::Mutex<()>,
}

impl Vm {
    /// Starts the process and sends it its configuration. It runs when [`Vm::stamps`] says so.
    pub async fn start(
        place: Place<'_>,
        hardware: Hardware<'_>,
        ledger: &mut Ledger,
    ) -> Result<Vm, Error> {
        let peer = Arc::new(Peer::start(place, "run", ledger)?);
        let mut fds = Vec::new();
        let config = config(place.sandbox, &hardware, &peer, &mut fds);
        let sent = peer.control.send(&config, &fds).await;
        let vm = Vm::of(peer);
        match sent {
            Ok(()) => Ok(vm),
            // It died before it could read: its own words say more than our broken pipe.
            Err(control::Error::Io { .. }) => Err(Error::Gone(vm.ended().await)),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what the process says from now on.
    fn of(peer: Arc<Peer>) -> Vm {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (ended, end) = watch::channel(None);
        tokio::spawn(watch_events(peer.clone(), shared.clone(), ended));
        Vm {
            peer,
            shared,
            end,
            sending: tokio::sync::Mutex::new(()),
        }
    }

    /// The VMM's pid.
    pub fn pid(&self) -> i32 {
        self.peer.pid
    }

    /// The phases reached so far.
    pub fn stamps(&self) -> Vec<Stamp> {
        locked(&self.shared).stamps.clone()
    }

    /// Waits until the process is gone and tells how it ended.
    pub async fn ended(&self) -> End {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().expect("waited for it"),
            Err(_) => End::Died {
                death: None,
                trouble: self.peer.tail.trouble(),
                log: self.peer.tail.lines(),
            },
        }
    }

    /// Lets the guest dial `port` once; its bytes come out of the other end of `fd`'s socketpair.
    pub async fn offer_port(&self, port: u32, fd: OwnedFd) -> Result<(), Error> {
        let offer = Request::OfferPort(PortOffer { port, fd: Fd(0) });
        self.request("a stream", &offer, &[fd.as_raw_fd()])
            .await
            .map(drop)
    }

    /// Adds a network interface; the guest finds it when it looks again.
    pub async fn plug(&self, nic: Nic) -> Result<(), Error> {
        let mut fds = Vec::new();
        let device = nic.config(|fd| {
            fds.push(fd);
            Fd(fds.len() as u32 - 1)
        });
        self.request("a network interface", &Request::PlugNet(device), &fds)
            .await
            .map(drop)
    }

    /// Tells the guest whether the link of its Nth network device carries frames.
    pub async fn set_link(&self, device: u32, up: bool) -> Result<(), Error> {
        let request = Request::SetLink { device, up };
        self.request("a change of a link", &request, &[])
            .await
            .map(drop)
    }

    /// Takes back a port that the guest has not dialled.
    pub async fn withdraw_port(&self, port: u32) -> Result<(), Error> {
        let request = Request::WithdrawPort { port };
        self.request("to forget a stream", &request, &[])
            .await
            .map(drop)
    }

    /// Kills the process without a word; [`Vm::ended`] tells.
    pub fn kill(&self) {
        self.peer.kill();
    }

    /// Counters as of now.
    pub async fn stats(&self) -> Result<VmStats, Error> {
        let stats = self.request("its counters", &Request::Stats, &[]).await?;
        Ok(stats.unwrap_or_default())
    }

    /// Ends the machine without asking the guest.
    pub async fn stop(&self) -> Result<(), Error> {
        let _order = self.sending.lock().await;
        Ok(self.peer.control.send(&Request::Stop, &[]).await?)
    }

    async fn request(
        &self,
        name: &'static str,
        request: &Request,
        fds: &[i32],
    ) -> Result<Option<VmStats>, Error> {
        let (answer, answered) = oneshot::channel();
        let sent = {
            let _order = self.sending.lock().await;
            let turn = Turn::last(&self.shared, answer);
            let sent = self.peer.control.send(request, fds).await;
            if sent.is_ok() {
                turn.keep();
            }
            sent
        };
        match sent {
            Ok(()) => {}
            Err(control::Error::Io { .. }) => return Err(Error::Gone(self.ended().await)),
            Err(error) => return Err(error.into()),
        }
        match answered.await {
            Ok(Ok(stats)) => Ok(stats),
            Ok(Err(reason)) => Err(Error::Refused {
                request: name,
                reason,
            }),
            Err(_) => Err(Error::Gone(self.ended().await)),
        }
    }
}

/// Builds the configuration; the descriptors it names by index go to `fds`.
fn config(sandbox: &str, hardware: &Hardware<'_>, peer: &Peer, fds: &mut Vec<i32>) -> VmConfig {
    let mut index = |fd: i32| {
        fds.push(fd);
        Fd(fds.len() as u32 - 1)
    };
    let offer = |(port, fd): &(u32, OwnedFd), index: &mut dyn FnMut(i32) -> Fd| PortOffer {
        port: *port,
        fd: index(fd.as_raw_fd()),
    };
    VmConfig {
        version: WIRE_VERSION,
        sandbox_id: sandbox.into(),
        vcpus: hardware.vcpus,
        memory_mib: hardware.memory_mib,
        kvm: index(hardware.kvm.as_raw_fd()),
        kernel: index(hardware.kernel.as_raw_fd()),
        initrd: index(hardware.initrd.as_raw_fd()),
        extra_cmdline: hardware.kernel_arguments.clone(),
        ports: hardware
            .ports
            .iter()
            .map(|port| offer(port, &mut index))
            .collect(),
        fs: vec![FsDevice {
            tag: hardware.share.0.clone(),
            socket: index(hardware.share.1.as_raw_fd()),
            queues: hardware.share.2,
        }],
        net: hardware
            .net
            .iter()
            .map(|nic| nic.config(&mut index))
            .collect(),
        net_slots: hardware.net_slots,
        serial: hardware.serial.map(|fd| SerialConsole {
            output: index(fd.as_raw_fd()),
        }),
        log: index(peer.log.as_raw_fd()),
        uid: hardware.uid,
        gid: hardware.uid,
    }
}

/// Reads events until the machine is gone, then publishes how.
async fn watch_events(
    peer: Arc<Peer>,
    shared: Arc<Mutex<Shared>>,
    ended: watch::Sender<Option<End>>,
) {
    let mut last_words = None;
    loop {
        match peer.control.receive::<Event>().await {
            Ok(Some(event)) => {
                if let Some(end) = on_event(event, &shared) {
                    last_words = Some(end);
                }
            }
            Ok(None) => break,
            Err(error) => {
                last_words.get_or_insert(End::Failed {
                    reason: line(&error),
                });
                // Nobody hears it any more: its end would not come by itself.
                peer.kill();
                break;
            }
        }
    }
    let death = peer.death().await;
    let end = last_words.unwrap_or_else(|| End::Died {
        death,
        trouble: peer.tail.trouble(),
        log: peer.tail.lines(),
    });
    // Whoever waits for an answer learns that there will be none.
    locked(&shared).waiting.clear();
    let _ = ended.send(Some(end));
}

fn on_event(event: Event, shared: &Mutex<Shared>) -> Option<End> {
    let mut shared = locked(shared);
    let mut answer = |answer| {
        if let Some(waiting) = shared.waiting.pop_front() {
            // The one who asked may have given up.
            let _ = waiting.send(answer);
        }
    };
    match event {
        Event::Running => {}
        Event::Done => answer(Ok(None)),
        Event::Refused { reason } => answer(Err(printable(&reason))),
        Event::Stats(stats) => answer(Ok(Some(stats))),
        Event::Reached(stamp) => shared.stamps.push(stamp),
        Event::Ended {
            end,
            console,
            stats,
        } => {
            return Some(End::Guest {
                end,
                console: console.iter().map(|line| printable(line)).collect(),
                stats: Box::new(stats),
            });
        }
        Event::Failed { reason } => {
            return Some(End::Failed {
                reason: printable(&reason),
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::{fs::File, time::Duration};

    use super::*;
    use crate::control::Control;

    /// The machine, and the VMM's end of its control socket: the test is the VMM.
    fn machine() -> (Vm, Control) {
        let (peer, theirs) = peer::tests::idle();
        (Vm::of(Arc::new(peer)), theirs)
    }

    fn nic(taps: usize) -> Nic {
        let tap = || OwnedFd::from(File::open("/dev/null").unwrap());
        Nic {
            taps: (0..taps).map(|_| tap()).collect(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            receive: RateLimit::default(),
            transmit: RateLimit::default(),
        }
    }

    /// Asks for the counters and answers with some that are known.
    async fn is_in_step(vm: &Vm, theirs: &Control) {
        let told = VmStats {
            user_exits: [("told".to_string(), 7)].into(),
            ..VmStats::default()
        };
        let answer = async {
            let request = theirs.receive::<Request>().await.unwrap();
            assert_eq!(request, Some(Request::Stats));
            theirs.send(&Event::Stats(told.clone()), &[]).await.unwrap();
        };
        let asked = tokio::time::timeout(Duration::from_secs(10), vm.stats());
        let (stats, ()) = tokio::join!(asked, answer);
        assert_eq!(stats.expect("no answer").unwrap(), told);
    }

    #[tokio::test]
    async fn a_request_that_cannot_be_sent_takes_nobodys_answer() {
        let (vm, theirs) = machine();
        let refused = vm.plug(nic(bulkhead_vmm_config::MAX_FDS + 1)).await;
        let error = refused.unwrap_err();
        assert!(
            matches!(error, Error::Control(control::Error::TooLarge(..))),
            "{error}"
        );
        is_in_step(&vm, &theirs).await;
        vm.kill();
    }

    #[tokio::test]
    async fn a_request_given_up_while_it_is_sent_takes_nobodys_answer() {
        let (vm, theirs) = machine();
        // Until the socket takes no more.
        let soon = Duration::from_millis(100);
        let mut sent = 0;
        while let Ok(sent_one) =
            tokio::time::timeout(soon, vm.peer.control.send(&Request::Pause, &[])).await
        {
            sent_one.unwrap();
            sent += 1;
        }
        let given_up = tokio::time::timeout(soon, vm.set_link(0, true)).await;
        given_up.unwrap_err();
        for _ in 0..sent {
            let request = theirs.receive::<Request>().await.unwrap();
            assert_eq!(request, Some(Request::Pause));
        }
        is_in_step(&vm, &theirs).await;
        vm.kill();
    }

    #[tokio::test]
    async fn a_request_given_up_once_it_is_sent_keeps_its_answer() {
        let (vm, theirs) = machine();
        let soon = Duration::from_millis(100);
        let given_up = tokio::time::timeout(soon, vm.set_link(0, true)).await;
        given_up.unwrap_err();
        let request = theirs.receive::<Request>().await.unwrap();
        assert!(matches!(request, Some(Request::SetLink { .. })));
        theirs.send(&Event::Done, &[]).await.unwrap();
        is_in_step(&vm, &theirs).await;
        vm.kill();
    }

    #[tokio::test]
    async fn a_machine_that_is_not_understood_is_ended() {
        let (vm, theirs) = machine();
        theirs.send(&"no event", &[]).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(10), vm.ended()).await;
        let end = ended.expect("it goes on");
        assert!(matches!(end, End::Failed { .. }), "{end:?}");
    }
}
