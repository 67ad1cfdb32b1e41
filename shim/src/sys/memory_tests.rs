//! What a thread's work takes of the heap, counted by an allocator of the tests' own.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    time::Duration,
};

/// Most that an attack may make the shim take (issue 12).
pub(crate) const MOST: usize = 16 << 20;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

fn count(change: isize) {
    // A thread that ends has no place for it any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(place, layout, size) }
    }
}

/// Runs the shim's side of an attack in a runtime of its own on this thread: it must end soon, and
/// take no more than [`MOST`]. The attacker has a thread of its own, which is not counted.
pub(crate) fn withstand<T>(work: impl AsyncFnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    bounded(|| {
        runtime.block_on(async {
            let work = tokio::time::timeout(Duration::from_secs(60), work());
            work.await.expect("it does not end")
        })
    })
}

/// Runs what must take no more than [`MOST`] on this thread.
pub(crate) fn bounded<T>(work: impl FnOnce() -> T) -> T {
    let before = LIVE.get();
    PEAK.set(before);
    let done = work();
    let taken = usize::try_from(PEAK.get() - before).unwrap_or(0);
    assert!(taken <= MOST, "it took {taken} bytes");
    done
}

/// Bytes that look random and are the same each time.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    /// xorshift64 (Marsaglia 2003).
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// The same with some bytes changed, some gone, and perhaps something in between.
    pub(crate) fn spoil(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut spoilt = bytes.to_vec();
        for _ in 0..1 + self.below(4) {
            let at = self.below(spoilt.len() + 1);
            match self.below(4) {
                0 => spoilt.truncate(at),
                1 => {
                    let count = self.below(40);
                    let more = self.bytes(count);
                    spoilt.splice(at..at, more);
                }
                _ => {
                    if let Some(byte) = spoilt.get_mut(at) {
                        *byte = self.next() as u8;
                    }
                }
            }
        }
        spoilt
    }
}

#[test]
fn what_is_taken_is_counted() {
    let attack = std::panic::catch_unwind(|| withstand(async || vec![0u8; MOST + 1].len()));
    attack.unwrap_err();
    // Before, and on another thread, does not count.
    let held = vec![1u8; 2 * MOST];
    withstand(async || {
        let other = std::thread::spawn(|| vec![1u8; 2 * MOST].len());
        assert_eq!(other.join().unwrap(), held.len());
    });
}
