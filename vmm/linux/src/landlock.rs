//! landlock(7), as far as one asks before one uses it.

use nix::Result;
use nix::errno::Errno;

/// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
const VERSION: u32 = 1;

/// landlock_create_ruleset(2): the version of the interface that the kernel offers, from 1.
///
/// # Errors
/// `ENOSYS` in a kernel that is built without Landlock, `EOPNOTSUPP` in one that was booted without
/// it.
pub fn abi() -> Result<u32> {
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: asked for the version the kernel reads no memory: the pointer is null, the size 0.
    let answer =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    Errno::result(answer).map(|abi| abi as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_has_it_or_says_why_not() {
        match abi() {
            Ok(abi) => assert!((1..1000).contains(&abi), "{abi}"),
            Err(errno) => assert!(
                matches!(errno, Errno::ENOSYS | Errno::EOPNOTSUPP),
                "{errno}"
            ),
        }
    }
}
