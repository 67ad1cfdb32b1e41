//! The control queue (VIRTIO 1.2 §5.1.6.5).

use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::*;
use vm_memory::GuestMemoryMmap;

use super::offload;
use super::pace::Pace;
use super::tap::Tap;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::queue::VirtQueue;

/// §5.1.6.5: the only command of its class that sets offloads; the bindings leave it out.
const GUEST_OFFLOADS_SET: u32 = 0;

/// Commands that one wake-up executes before the frames get their turn.
const TURN: usize = 16;

/// The queue, and what its commands change.
pub struct Control {
    queue: VirtQueue,
    memory: GuestMemoryMmap,
    /// One for each pair of queues; the first one's takes part always.
    taps: Vec<Arc<Tap>>,
    features: u64,
    pace: Pace,
    /// What the taps are told now: pairs that take part, and offloads.
    pairs: usize,
    offloads: u64,
    chain: Chain,
}

impl Control {
    pub fn new(
        queue: VirtQueue,
        memory: GuestMemoryMmap,
        taps: Vec<Arc<Tap>>,
        features: u64,
        pace: Pace,
    ) -> Control {
        Control {
            queue,
            memory,
            taps,
            features,
            pace,
            pairs: 1,
            offloads: features,
            chain: Chain::default(),
        }
    }

    /// Rings when there is a command.
    pub fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Executes the commands that are there.
    pub fn serve(&mut self) -> Result<(), Fault> {
        for _ in 0..TURN {
            if !self.queue.pop(&mut self.chain)? {
                match self.queue.ask_for_kick()? {
                    true => continue,
                    false => return self.queue.signal_used(),
                }
            }
            let answer = match self.execute()? {
                true => VIRTIO_NET_OK,
                false => VIRTIO_NET_ERR,
            };
            // A driver polls for the answer: one command at a time.
            let writable = self.chain.writable();
            writable.write(&self.memory, &[answer as u8])?;
            self.queue.push(&self.chain, 1)?;
        }
        self.queue.kick_self();
        self.queue.signal_used()
    }

    /// Whether the command is one that we know and that can be done.
    fn execute(&mut self) -> Result<bool, Fault> {
        let has = |feature: u32| self.features & 1 << feature != 0;
        let command = self.chain.readable();
        let mut words = [0; 2];
        command.read(&self.memory, &mut words)?;
        let done = match (u32::from(words[0]), u32::from(words[1])) {
            // The guest gets all that the interface gets, so that each of these is so already.
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
            | (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => has(VIRTIO_NET_F_CTRL_RX),
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let mut bytes = [0; 4];
                command.read(&self.memory, &mut bytes)?;
                let pairs = u16::from_le_bytes([bytes[2], bytes[3]]).into();
                has(VIRTIO_NET_F_MQ) && self.use_pairs(pairs)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
                let mut bytes = [0; 10];
                command.read(&self.memory, &mut bytes)?;
                let wanted: [u8; 8] = bytes[2..].try_into().expect("eight bytes");
                has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) && self.offload(u64::from_le_bytes(wanted))
            }
            _ => false,
        };
        Ok(done)
    }

    fn use_pairs(&mut self, pairs: usize) -> bool {
        if !(1..=self.taps.len()).contains(&pairs) {
            return false;
        }
        if pairs == self.pairs {
            return true;
        }
        self.pace.wait();
        let (first, last) = (pairs.min(self.pairs), pairs.max(self.pairs));
        let attached = pairs > self.pairs;
        let changed = self.taps[first..last].iter();
        let done = changed
            .map(|tap| tap.attach_queue(attached))
            .all(|done| done.is_ok());
        if done {
            self.pairs = pairs;
        }
        done
    }

    /// §5.1.6.5.6.2: only what was negotiated.
    fn offload(&mut self, wanted: u64) -> bool {
        if wanted & !self.features != 0 {
            return false;
        }
        let flags = offload::flags(wanted);
        if flags == offload::flags(self.offloads) {
            return true;
        }
        self.pace.wait();
        let done = self.taps[0].set_offloads(flags).is_ok();
        if done {
            self.offloads = wanted;
        }
        done
    }
}
