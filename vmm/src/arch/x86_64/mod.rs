//! x86-64: where things are, what the processor says of itself, how interrupts travel.
pub mod cpu;
pub mod cpuid;
pub mod interrupts;
pub mod layout;
