//! A running virtqueue: chains come out checked, used ones go back, the driver is interrupted no more than it wants.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, in_one_region};
use super::fault::Fault;
use super::signal::Signal;

/// Largest queue of any device here; bounds what one chain can name.
pub const MAX_SIZE: u16 = 1024;

/// Where a driver put a queue (VIRTIO 1.2 §2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Descriptor table, 16-byte aligned.
    pub table: u64,
    /// Available ring, 2-byte aligned.
    pub available: u64,
    /// Used ring, 4-byte aligned.
    pub used: u64,
}

impl Layout {
    /// Checks sizes, alignments and that each part lies in one region of RAM, so that no ring access can fail later.
    pub fn is_valid(&self, memory: &GuestMemoryMmap, max_size: u16) -> bool {
        let fits = |((address, length), align): ((u64, u64), u64)| {
            address != 0
                && address.is_multiple_of(align)
                && in_one_region(memory, GuestAddress(address), length)
        };
        self.size.is_power_of_two()
            && self.size <= max_size
            && self.parts().into_iter().zip([16, 2, 4]).all(fits)
    }

    /// Address and bytes of the table and of both rings.
    pub fn parts(&self) -> [(u64, u64); 3] {
        let size = u64::from(self.size);
        [
            (self.table, 16 * size),
            (self.available, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ]
    }
}

/// One queue of an activated device.
pub struct VirtQueue {
    queue: Queue,
    layout: Layout,
    memory: GuestMemoryMmap,
    kick: EventFd,
    signal: Signal,
    /// A bit for each head that the device holds, so that a chain made available twice is caught.
    held: [u64; MAX_SIZE as usize / 64],
    event_idx: bool,
    used_since_signal: bool,
}

impl VirtQueue {
    /// A queue at `layout`, which [`Layout::is_valid`] has passed.
    pub(super) fn new(
        layout: Layout,
        event_idx: bool,
        memory: GuestMemoryMmap,
        kick: EventFd,
        signal: Signal,
    ) -> Result<VirtQueue, Fault> {
        let mut queue = Queue::new(layout.size).map_err(|_| Fault::Ring)?;
        let placed = queue
            .try_set_desc_table_address(GuestAddress(layout.table))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(layout.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(layout.used)));
        placed.map_err(|_| Fault::Ring)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(VirtQueue {
            queue,
            layout,
            memory,
            kick,
            signal,
            held: [0; MAX_SIZE as usize / 64],
            event_idx,
            used_since_signal: false,
        })
    }

    /// Goes on where a device at rest has left the queue: whatever it took it had given back, so
    /// that the used ring's index says both.
    pub(super) fn resume(&mut self) -> Result<(), Fault> {
        let used = self.queue.used_idx(&self.memory, Ordering::Acquire);
        let used = used.map_err(|_| Fault::Ring)?.0;
        self.queue.set_next_avail(used);
        self.queue.set_next_used(used);
        Ok(())
    }

    /// The index of the next chain to be taken, for a vhost-user back end.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Where the driver put it, for a vhost-user back end.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Becomes readable when the driver has made chains available, and stays so unless it is taken; each kick is an edge.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Empties a kick that is watched for its level, before the ring is looked at.
    pub fn take_kick(&self) {
        // The eventfd does not block: an error says that it was empty.
        let _ = self.kick.read();
    }

    /// Wakes the handler again, for a device that stops early to let others run.
    pub fn kick_self(&self) {
        // The only error is a full counter, which wakes as well.
        let _ = self.kick.write(1);
    }

    /// Takes the next available chain into `chain`; false when there is none.
    ///
    /// # Errors
    /// The guest's fault; the queue must not be used any more.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let next = match self.queue.iter(&self.memory) {
            Ok(mut available) => available.next(),
            Err(Error::InvalidAvailRingIndex) => return Err(Fault::AvailableIndex),
            Err(_) => return Err(Fault::Ring),
        };
        let Some(next) = next else { return Ok(false) };
        let head = next.head_index();
        let table = GuestAddress(self.layout.table);
        chain.walk(&self.memory, table, self.layout.size, head)?;
        let (word, bit) = held_bit(head);
        if self.held[word] & bit != 0 {
            return Err(Fault::HeadInFlight(head));
        }
        self.held[word] |= bit;
        Ok(true)
    }

    /// Puts the last popped chain back, as if it had not been popped. Several are put back last first.
    pub fn unpop(&mut self, chain: &Chain) {
        let (word, bit) = held_bit(chain.head());
        self.held[word] &= !bit;
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `written` bytes in it.
    ///
    /// # Errors
    /// The used ring is not accessible.
    pub fn push(&mut self, chain: &Chain, written: u32) -> Result<(), Fault> {
        let (word, bit) = held_bit(chain.head());
        self.held[word] &= !bit;
        self.used_since_signal = true;
        self.queue
            .add_used(&self.memory, chain.head(), written)
            .map_err(|_| Fault::Ring)
    }

    /// Interrupts the driver for what was pushed since the last time, if it wants that (§2.7.7).
    ///
    /// # Errors
    /// The available ring is not accessible.
    pub fn signal_used(&mut self) -> Result<(), Fault> {
        if !std::mem::take(&mut self.used_since_signal) {
            return Ok(());
        }
        let wanted = self
            .queue
            .needs_notification(&self.memory)
            .map_err(|_| Fault::Ring)?;
        if wanted && (self.event_idx || !self.driver_declines()?) {
            self.signal.used_buffer();
        }
        Ok(())
    }

    /// Lets the driver skip kicks while the device looks at the ring anyway.
    ///
    /// # Errors
    /// The used ring is not accessible.
    pub fn suppress_kicks(&mut self) -> Result<(), Fault> {
        self.queue
            .disable_notification(&self.memory)
            .map_err(|_| Fault::Ring)
    }

    /// Asks for a kick when the next chain comes; true when one came meanwhile, for which there will be none.
    ///
    /// # Errors
    /// The rings are not accessible.
    pub fn ask_for_kick(&mut self) -> Result<bool, Fault> {
        self.queue
            .enable_notification(&self.memory)
            .map_err(|_| Fault::Ring)
    }

    /// §2.7.7: without event indices the driver suppresses interrupts by a flag, which virtio-queue does not read.
    fn driver_declines(&self) -> Result<bool, Fault> {
        let flags: u16 = self
            .memory
            .read_obj(GuestAddress(self.layout.available))
            .map_err(|_| Fault::Ring)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }
}

/// The head is below the queue's size, thus below [`MAX_SIZE`], once the walk has passed it.
fn held_bit(head: u16) -> (usize, u64) {
    (usize::from(head / 64), 1 << (head % 64))
}
