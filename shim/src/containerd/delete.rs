//! Delete: of a process, of a container, and with the last one of the pod.

use std::sync::Arc;

use containerd_shim_protos::events::task as events_wire;

use super::{Error, Exit, Phase, Task, Tasks};
use crate::pod::{Pod, promptly};
use crate::{
    containerd::events::{Event, timestamp},
    hooks,
};

impl Tasks {
    /// Forgets an exec process.
    pub(super) async fn delete_exec(&self, task: &Arc<Task>, exec_id: &str) -> Result<Exit, Error> {
        let exec = task.exec(exec_id)?;
        let exit = match exec.process.phase() {
            Phase::Stopped(exit) => {
                exec.process.drain().await;
                // Gone with its container, or with the guest, is as good.
                let _ = promptly(task.pod.agent().delete_process(&task.id, exec_id)).await;
                exit
            }
            Phase::Added => Exit::now(0),
            phase => return Err(exec.process.refuse("delete", phase)),
        };
        match task.execs().remove(exec_id) {
            Some(_) => Ok(exit),
            None => task.exec(exec_id).map(|_| exit),
        }
    }

    /// Forgets a container that has ended, or one that was never started, with all that it held.
    pub(super) async fn delete(&self, id: &str) -> Result<(u32, Exit), Error> {
        let task = self.task(id)?;
        let _one = task.deletion.lock().await;
        // Whoever waited for another Delete finds nothing left.
        self.task(id)?;
        let exit = match task.init.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Created => self.end_created(&task).await?,
            phase => return Err(task.init.refuse("delete", phase)),
        };
        task.init.drain().await;
        let execs: Vec<_> = task.execs().values().cloned().collect();
        for exec in execs {
            exec.process.disconnect();
        }
        if task.holds_pod {
            task.pod.begin_end();
            // Members that were not deleted before end with the pod, and say so.
            self.end_all(137, false);
            task.pod.end().await;
            self.set_pod(None);
        } else {
            Undo::of(&task.pod, id).run().await;
        }
        self.slots().remove(id);
        self.events.publish(Event::Delete(events_wire::TaskDelete {
            container_id: id.into(),
            pid: task.pid(),
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        }));
        if let Some(guest) = &task.guest {
            let state = guest.plan.state(&task, "stopped");
            if let Err(error) = hooks::run("poststop", &guest.hooks.stopped, &state).await {
                // OCI runtime.md#lifecycle: a failing poststop hook is logged and changes nothing.
                tracing::warn!(%error, "poststop hook failed");
            }
        }
        Ok((task.pid(), exit))
    }

    /// Ends a container that stands before its exec.
    async fn end_created(&self, task: &Arc<Task>) -> Result<Exit, Error> {
        let killed = self.kill(&task.id, "", libc::SIGKILL as u32, true).await;
        match killed {
            Ok(()) | Err(Error::NotFound(_)) => {
                // It comes to an end, whatever the guest does.
                Ok(task.init.ended().await)
            }
            Err(error) => Err(error),
        }
    }
}

/// Takes a member's traces out of a pod that goes on.
pub(super) struct Undo<'a> {
    pod: &'a Pod,
    id: &'a str,
}

impl<'a> Undo<'a> {
    pub(super) fn of(pod: &'a Pod, id: &'a str) -> Undo<'a> {
        Undo { pod, id }
    }

    /// Past errors: what is left is in the ledger, and goes with the pod.
    pub(super) async fn run(&self) {
        if let Err(error) = promptly(self.pod.agent().delete(self.id)).await {
            // A container that was never made, or a guest that does not answer: the host lets go all the same.
            tracing::debug!(container = self.id, error = %error.text(), "not deleted in the guest");
        }
        let mut held = self.pod.held().await;
        if let Some(held) = held.as_mut()
            && let Err(error) = held.withdraw(self.id).await
        {
            tracing::error!(container = self.id, error = %error.text(), "its files stay in the share until the pod ends");
        }
    }
}
