//! /dev/kvm for unit tests of ioctls; interpreted or not, small guests run on any.

use kvm_ioctls::Kvm;

/// Opens it. Where it is missing the test is skipped, which it says; with `BULKHEAD_REQUIRE_KVM` set it fails instead.
pub fn open() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            assert!(
                std::env::var_os("BULKHEAD_REQUIRE_KVM").is_none(),
                "/dev/kvm cannot be opened: {error}"
            );
            eprintln!("SKIPPED: /dev/kvm cannot be opened: {error}");
            None
        }
    }
}
