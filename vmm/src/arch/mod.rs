//! What depends on the processor architecture. One so far.
#![forbid(unsafe_code)]

pub mod x86_64;
