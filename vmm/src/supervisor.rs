//! The machine's side of the control socket: requests in, reports out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_vmm_config::{Event, GuestEnd, NetDevice, PortOffer, Request, VmStats};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::epoll::EventSet;

use crate::control::{ControlError, ControlSocket, Descriptors};
use crate::devices::virtio::balloon::Gauge;
use crate::devices::virtio::mem::Plug;
use crate::devices::virtio::net::NetPorts;
use crate::devices::virtio::vsock::{Ports, Withdrawn};
use crate::event_loop::{Handler, Poller};
use crate::lending::lender::Lender;
use crate::log::{Log, chain};
use crate::reports::{Ending, Reports};
use crate::spec;
use crate::vcpu::Vcpus;

/// Key of the control socket on the event loop.
const CONTROL: u32 = 0;
/// Key of the reports' bell.
const BELL: u32 = 1;
/// Key of the fs process's questions.
const LENDER: u32 = 2;

/// Why the machine is to stop.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The guest ended.
    Guest(Ending),
    /// The shim asked for it, or has gone.
    Stopped,
    /// The shim asked for it to be saved.
    Save,
    /// The control socket cannot be used any more.
    Failed(String),
}

/// Has a supervisor's poller watch what it hears.
///
/// # Errors
/// epoll_ctl(2)'s.
pub fn watch(
    poller: &Poller,
    control: &ControlSocket,
    reports: &Reports,
    lender: Option<&Lender>,
) -> io::Result<()> {
    poller.add(control, CONTROL, EventSet::IN)?;
    poller.add(reports.bell(), BELL, EventSet::IN)?;
    lender.map_or(Ok(()), |lender| poller.add(lender, LENDER, EventSet::IN))
}

/// Answers the shim and passes reports on, on the event loop's thread.
pub struct Supervisor {
    control: ControlSocket,
    reports: Arc<Reports>,
    vcpus: Vcpus,
    ports: Ports,
    net: NetPorts,
    balloon: Option<Gauge>,
    memory: Option<Plug>,
    lender: Option<Lender>,
    poller: Poller,
    log: Log,
    can_save: bool,
    outcome: Option<Outcome>,
}

impl Supervisor {
    /// A supervisor of parked vCPUs, whose `poller` is [`watch`]'s.
    pub fn new(
        control: ControlSocket,
        reports: Arc<Reports>,
        vcpus: Vcpus,
        (ports, net, balloon, memory): (Ports, NetPorts, Option<Gauge>, Option<Plug>),
        poller: Poller,
        (lender, log, can_save): (Option<Lender>, Log, bool),
    ) -> Supervisor {
        Supervisor {
            control,
            reports,
            vcpus,
            ports,
            net,
            balloon,
            memory,
            lender,
            poller,
            log,
            can_save,
            outcome: None,
        }
    }

    /// Tells the shim, and what the jail has of Landlock, and lets the vCPUs run.
    ///
    /// # Errors
    /// The shim has gone.
    pub fn start(&mut self, landlock: Option<u32>) -> Result<(), ControlError> {
        self.pass_reports();
        self.control.send(&Event::Running { landlock })?;
        self.vcpus.resume();
        Ok(())
    }

    /// Stops the vCPUs for good and listens to nobody any more.
    pub fn stop(&mut self) -> Vec<VcpuFd> {
        // A vCPU may wait for the fs process, and that for an answer. Nobody in the guest is to see a request that ends for
        // want of one.
        self.vcpus.pause();
        if let Some(lender) = self.lender.take() {
            let (questions, lent) = lender.summary();
            self.log.info(&format!(
                "{} KiB are lent by the template still; the fs process has asked {questions} times",
                lent >> 10
            ));
        }
        let vcpus = self.vcpus.stop();
        // They are watched since the start.
        let _ = self.poller.remove(&self.control);
        let _ = self.poller.remove(self.reports.bell());
        vcpus
    }

    /// Passes on what was reported, once more after the last queue was served.
    pub fn pass_reports(&mut self) {
        let (stamps, resets, ending) = self.reports.take();
        for stamp in stamps {
            self.send(&Event::Reached(stamp));
        }
        for (device, reason) in resets {
            let (device, reason) = (device.to_owned(), reason.to_owned());
            self.send(&Event::NeedsReset { device, reason });
        }
        if let Some(ending) = ending {
            self.end(Outcome::Guest(ending));
        }
    }

    /// Why the machine is to stop, once it is.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// All counters.
    pub fn stats(&self) -> VmStats {
        let mut stats = VmStats {
            guest_faults: self.reports.guest_faults(),
            net: self.net.stats(),
            balloon: self.balloon.as_ref().map(Gauge::read),
            plugged: self.memory.as_ref().map(Plug::stats),
            ..VmStats::default()
        };
        self.vcpus.add_stats(&mut stats.kvm, &mut stats.user_exits);
        stats
    }

    /// Tells how the guest ended, and its console's last lines.
    pub fn tell_end(&mut self, end: GuestEnd, console: Vec<String>) {
        let stats = self.stats();
        self.send(&Event::Ended {
            end,
            console,
            stats,
        });
    }

    /// Sends an event; without the shim there is nobody to tell.
    pub fn send(&mut self, event: &Event) {
        match self.control.send(event) {
            Ok(()) => {}
            Err(ControlError::Closed) => self.end(Outcome::Stopped),
            Err(error) => self.end(Outcome::Failed(chain(&error))),
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    fn next_request(&mut self) {
        match self.control.receive::<Request>() {
            Ok((request, fds)) => self.answer(request, fds),
            Err(ControlError::Closed) => {
                self.log.info("the shim closed the control socket");
                self.end(Outcome::Stopped);
            }
            Err(error) => self.end(Outcome::Failed(chain(&error))),
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let result = match request {
            Request::OfferPort(offer) => self.offer(offer, fds),
            Request::PlugNet(device) => self.plug(&device, fds),
            other if !fds.is_empty() => Err(format!(
                "{other:?} needs no descriptors, {} came",
                fds.len()
            )),
            Request::WithdrawPort { port } => match self.ports.withdraw(port) {
                Withdrawn::Nothing => Err(format!("vsock port {port} is not offered")),
                _ => Ok(()),
            },
            Request::SetLink { device, up } => match self.net.set_link(device, up) {
                true => Ok(()),
                false => Err(format!("there is no network device {device}")),
            },
            Request::PlugMemory { mib } => match &mut self.memory {
                Some(memory) => memory.request(mib).map_err(|error| chain(&error)),
                None => Err("the machine has no room for more memory".to_owned()),
            },
            Request::Pause => {
                self.vcpus.pause();
                Ok(())
            }
            Request::Resume => {
                self.vcpus.resume();
                Ok(())
            }
            Request::Stats => {
                let stats = self.stats();
                return self.send(&Event::Stats(stats));
            }
            Request::Save if self.can_save => return self.end(Outcome::Save),
            Request::Save => Err("the machine was given no files for a template".to_owned()),
            Request::Stop => return self.end(Outcome::Stopped),
        };
        self.send(&match result {
            Ok(()) => Event::Done,
            Err(reason) => Event::Refused { reason },
        });
    }

    /// Answers the fs process. One that is not understood is the machine's end.
    fn lend(&mut self) {
        let Some(lender) = &mut self.lender else {
            return;
        };
        match lender.answer(&self.vcpus) {
            Ok(true) => {}
            // Its end is noticed by its device.
            Ok(false) => self.lender = None,
            // Without its pages the share would fail in the guest, request by request.
            Err(error) => self.end(Outcome::Failed(chain(&error))),
        }
    }

    fn plug(&mut self, device: &NetDevice, fds: Vec<OwnedFd>) -> Result<(), String> {
        let mut fds = Descriptors::new(fds);
        let backend = spec::net_device(device, self.net.most_pairs(), &mut fds)
            .map_err(|error| chain(&error))?;
        fds.finish().map_err(|error| chain(&error))?;
        self.net.plug(backend).map_err(|error| chain(&error))
    }

    fn offer(&self, offer: PortOffer, fds: Vec<OwnedFd>) -> Result<(), String> {
        let mut fds = Descriptors::new(fds);
        let socket = fds
            .take(offer.fd, "offer_port")
            .map_err(|e| e.to_string())?;
        fds.finish().map_err(|e| e.to_string())?;
        spec::unix_stream(socket.as_fd(), "offer_port").map_err(|e| e.to_string())?;
        self.ports
            .offer(offer.port, socket)
            .map_err(|e| e.to_string())
    }
}

impl Handler for Supervisor {
    fn ready(&mut self, key: u32, _events: EventSet) {
        if self.outcome.is_some() {
            return;
        }
        match key {
            CONTROL => self.next_request(),
            LENDER => self.lend(),
            _ => self.pass_reports(),
        }
    }
}
