//! The links of the guest's network devices are up as those of the pod's interfaces are.

use std::{os::fd::AsFd, sync::Arc};

use tokio::io::{Interest, unix::AsyncFd};

use super::{background::Background, error::Error, launch::Vm};
use crate::{error::line, machine::vmm, netns::Carriers, sys};

/// Follows them until it is dropped.
pub(super) fn start(carriers: Carriers, vm: Arc<Vm>) -> Background {
    Background::start(async move {
        if let Err(error) = follow(carriers, &vm).await {
            tracing::debug!(error = %line(&error), "the guest's links are not followed any more");
        }
    })
}

async fn follow(mut carriers: Carriers, vm: &Vm) -> Result<(), Error> {
    let heard = carriers
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::Stream)?;
    let heard: AsyncFd<_> = sys::watch(heard, Interest::READABLE).map_err(Error::Stream)?;
    loop {
        match carriers.changes() {
            Ok(changes) => {
                for (device, up) in changes {
                    tracing::debug!(device, up, "a link");
                    // One that is stopped hears it when it goes on.
                    while let Err(error) = vm.set_link(device, up).await {
                        match error {
                            vmm::Error::Silent { .. } => {}
                            error => return Err(error.into()),
                        }
                    }
                }
            }
            // The next change is another reason to look.
            Err(error) => tracing::warn!(error = %line(&error), "cannot look at the pod's links"),
        }
        let mut ready = heard.readable().await.map_err(Error::Stream)?;
        // `changes` reads it empty.
        ready.clear_ready();
    }
}
