//! A pod that stands still: its virtual processors are stopped. Nothing in the guest happens, and
//! nothing is answered; the guest's clocks go on meanwhile, so that they are right when it does.

use std::sync::atomic::Ordering;

use super::{Error, Pod};

impl Pod {
    /// Stops the guest.
    ///
    /// # Errors
    /// The machine has gone, or does not answer.
    pub async fn pause(&self) -> Result<(), Error> {
        self.access.vm.set_paused(true).await?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Lets it go on; nothing happens when it does.
    ///
    /// # Errors
    /// The machine has gone, or does not answer.
    pub async fn resume(&self) -> Result<(), Error> {
        if self.paused.load(Ordering::Relaxed) {
            self.access.vm.set_paused(false).await?;
            self.paused.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether it stands still, and will until somebody resumes it.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed) && !self.is_ending()
    }
}
