//! One process, one microVM.
//!
//! `main` reads the configuration and sequences: [`spec`] checks, [`vm`] builds and runs, [`jail`] lies between the two.
//! [`bus`], [`event_loop`] and [`irq`] are what devices are made of.
pub mod arch;
pub mod boot;
pub mod build_id;
pub mod bus;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod fs;
pub mod irq;
pub mod jail;
pub mod lending;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod ramoops;
pub mod reports;
pub mod seccomp;
pub mod spec;
pub mod supervisor;
pub mod template;
#[cfg(test)]
mod test_kvm;
pub mod vcpu;
pub mod vm;

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    /// Tests are built as what is shipped is: by the release profile.
    #[test]
    #[should_panic(expected = "attempt to add with overflow")]
    fn arithmetic_is_checked_in_what_is_shipped() {
        black_box(black_box(u8::MAX) + 1);
    }
}
