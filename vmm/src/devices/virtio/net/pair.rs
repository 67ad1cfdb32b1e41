//! A receive and a transmit queue with their queue of the tap, on one thread.
//!
//! Kicks and timers are watched for their edges: each makes one event, and none has to be read, which would be a system call more
//! for each wake-up.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::control::Control;
use super::receive::{self, Receiver};
use super::tap::Tap;
use super::transmit::{self, Transmitter};
use crate::devices::virtio::device::ActivateError;
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::signal::Signal;
use crate::event_loop::{Handler, Poller};

const TAP: u32 = 0;
const RECEIVE: u32 = 1;
const TRANSMIT: u32 = 2;
const CONTROL: u32 = 3;
const RECEIVE_TIMER: u32 = 4;
const TRANSMIT_TIMER: u32 = 5;

/// What runs between activation and reset.
pub struct Running {
    receiver: Receiver,
    transmitter: Transmitter,
    /// Of the first pair.
    control: Option<Control>,
    tap: Arc<Tap>,
    signal: Signal,
    timers: Option<[TimerFd; 2]>,
    /// What the tap is watched for.
    interest: EventSet,
    receive_wait: receive::Wait,
    transmit_wait: transmit::Wait,
}

impl Running {
    pub fn new(
        receiver: Receiver,
        transmitter: Transmitter,
        control: Option<Control>,
        tap: Arc<Tap>,
        signal: Signal,
    ) -> Running {
        Running {
            receiver,
            transmitter,
            control,
            tap,
            signal,
            timers: None,
            interest: EventSet::IN,
            receive_wait: receive::Wait::Frame,
            transmit_wait: transmit::Wait::Kick,
        }
    }
}

/// The pair, running or not; the handler of a thread's event loop.
pub struct Pair {
    poller: Poller,
    running: Option<Running>,
}

impl Pair {
    pub fn new(poller: Poller) -> Pair {
        Pair {
            poller,
            running: None,
        }
    }

    /// Begins to serve.
    pub fn start(&mut self, mut running: Running) -> Result<(), ActivateError> {
        let attached = running.attach(&self.poller);
        self.running = Some(running);
        attached.map_err(|error| {
            self.stop();
            ActivateError::Host(Box::new(error))
        })
    }

    /// Ends serving: guest memory and the interrupt are not touched any more.
    pub fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.detach(&self.poller);
        }
    }
}

impl Handler for Pair {
    fn ready(&mut self, key: u32, events: EventSet) {
        let Some(running) = &mut self.running else {
            return;
        };
        if let Err(fault) = running.serve(key, events, &self.poller) {
            running.signal.fault(fault);
            self.stop();
        }
    }
}

impl Running {
    fn attach(&mut self, poller: &Poller) -> io::Result<()> {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if self.receiver.limiter.is_active() || self.transmitter.limiter.is_active() {
            let timers = self.timers.insert([TimerFd::new()?, TimerFd::new()?]);
            poller.add(&timers[0], RECEIVE_TIMER, edge)?;
            poller.add(&timers[1], TRANSMIT_TIMER, edge)?;
        }
        poller.add(self.receiver.queue().kick(), RECEIVE, edge)?;
        poller.add(self.transmitter.queue().kick(), TRANSMIT, edge)?;
        if let Some(control) = &self.control {
            poller.add(control.queue().kick(), CONTROL, edge)?;
        }
        poller.add(&*self.tap, TAP, self.interest)
    }

    /// What is not watched is nothing to fail for; a key that is left over nobody knows.
    fn detach(&self, poller: &Poller) {
        let _ = poller.remove(&*self.tap);
        let _ = poller.remove(self.receiver.queue().kick());
        let _ = poller.remove(self.transmitter.queue().kick());
        if let Some(control) = &self.control {
            let _ = poller.remove(control.queue().kick());
        }
        for timer in self.timers.iter().flatten() {
            let _ = poller.remove(timer);
        }
    }

    fn serve(&mut self, key: u32, events: EventSet, poller: &Poller) -> Result<(), Fault> {
        match key {
            // It cannot be muted, and nothing else says so while the driver has posted no buffers.
            TAP if events.intersects(EventSet::ERROR | EventSet::HANG_UP) => {
                self.receive_wait = receive::Wait::Gone;
            }
            TAP => {
                if events.contains(EventSet::OUT) {
                    self.transmit()?;
                }
                if events.contains(EventSet::IN) {
                    self.receive()?;
                }
            }
            RECEIVE | RECEIVE_TIMER => self.receive()?,
            TRANSMIT | TRANSMIT_TIMER => self.transmit()?,
            CONTROL => return self.control.as_mut().map_or(Ok(()), Control::serve),
            _ => {}
        }
        self.watch(poller);
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Fault> {
        if self.receive_wait == receive::Wait::Gone {
            return Ok(());
        }
        self.receive_wait = self.receiver.serve()?;
        if let receive::Wait::Time(wait) = self.receive_wait {
            self.arm(0, wait);
        }
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), Fault> {
        self.transmit_wait = self.transmitter.serve()?;
        if let transmit::Wait::Time(wait) = self.transmit_wait {
            self.arm(1, wait);
        }
        Ok(())
    }

    fn arm(&mut self, index: usize, wait: Duration) {
        if let Some(timers) = &mut self.timers {
            // Zero would disarm it. The call fails for durations only that are no such.
            let wait = wait.max(Duration::from_micros(1));
            let _ = timers[index].reset(wait, None);
        }
    }

    /// Watches the tap for what is waited for: a level that nobody serves would spin.
    fn watch(&mut self, poller: &Poller) {
        let mut wanted = EventSet::empty();
        if self.receive_wait == receive::Wait::Frame {
            wanted |= EventSet::IN;
        }
        if self.transmit_wait == transmit::Wait::Room {
            wanted |= EventSet::OUT;
        }
        if self.receive_wait == receive::Wait::Gone {
            // Its error cannot be muted.
            let _ = poller.remove(&*self.tap);
        } else if wanted != self.interest {
            // It is watched: the call has no reason to fail.
            let _ = poller.modify(&*self.tap, TAP, wanted);
        }
        self.interest = wanted;
    }
}
