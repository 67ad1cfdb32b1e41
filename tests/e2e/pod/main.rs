//! One pod with several containers, through the sandbox library: volumes that they share, and their coming and going.

mod grown;
mod kubelet;
mod many;
mod pod;
mod volumes;
