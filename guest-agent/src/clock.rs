//! The guest's wall clock, set by the host's.
//!
//! The kernel reads the time from KVM (kvm-clock) early in its boot, and from then on counts ticks. Until the local timer runs there are
//! none, so that its clock is behind by most of the boot when the agent begins; what the first request says of the time is older
//! still. So the agent asks the VMM by an I/O port: one exit, answered on the spot, between two readings of the guest's own clock.
//! The numbers are the VMM's (`CLOCK_PORT` of its configuration crate).

use std::io;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// A read of 4 bytes is the low half of the host's µs since the epoch.
pub(crate) const PORT: u16 = 0x8904;

/// How often the port is read; the quickest answer counts.
const READINGS: usize = 3;

/// Sets the wall clock to the host's, which `passed_ns` (since the epoch) is at most half an hour away from. Only for PID 1 of a guest.
pub(crate) fn set(passed_ns: u64) -> io::Result<()> {
    // SAFETY: ioperm changes only this thread's I/O permission bitmap; it touches no memory of ours.
    if unsafe { libc::ioperm(libc::c_ulong::from(PORT), 4, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let read = || {
        let before = monotonic_ns();
        let low: u32;
        // SAFETY: ioperm has just allowed these ports, so the instruction cannot fault; IN touches no memory.
        unsafe {
            std::arch::asm!("in eax, dx", in("dx") PORT, out("eax") low, options(nomem, nostack, preserves_flags));
        }
        let took = monotonic_ns().saturating_sub(before);
        (took, before, low)
    };
    let quickest = (0..READINGS).map(|_| read()).min();
    let (took, before, low) = quickest.expect("it is read at least once");
    // The answer was given half-way.
    let host_ns = near(passed_ns, low);
    let since_ns = monotonic_ns().saturating_sub(before.saturating_add(took / 2));
    let now_ns = host_ns.saturating_add(since_ns);
    let time = TimeSpec::new(
        (now_ns / 1_000_000_000) as i64,
        (now_ns % 1_000_000_000) as i64,
    );
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

/// The time in ns with the low half `low` of its µs that is nearest to `passed_ns`.
fn near(passed_ns: u64, low: u32) -> u64 {
    let passed = passed_ns / 1000;
    // Before it, where the host's clock was set back meanwhile.
    let distance = low.wrapping_sub(passed as u32) as i32;
    passed
        .saturating_add_signed(distance.into())
        .saturating_mul(1000)
}

/// CLOCK_MONOTONIC in ns.
pub fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_the_vmms() {
        assert_eq!(PORT, bulkhead_vmm_config::CLOCK_PORT);
    }

    #[test]
    fn half_a_time_and_an_old_one_make_a_time() {
        let low = |micros: u64| micros as u32;
        for passed in [
            1_795_966_022_178_000,
            0x0006_0000_ffff_fff0,
            0x0006_0001_0000_0000,
        ] {
            for later in [0, 1, 17, 7_200_000, 0x7fff_ffff] {
                let now: u64 = passed + later;
                assert_eq!(near(passed * 1000 + 999, low(now)), now * 1000);
            }
            // Set back.
            let now = passed - 3_000_000;
            assert_eq!(near(passed * 1000, low(now)), now * 1000);
        }
        assert_eq!(near(0, u32::MAX), 0);
    }
}
