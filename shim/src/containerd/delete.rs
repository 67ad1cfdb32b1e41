//! Delete: of a process, of a container, and with the last one of the pod.

use std::sync::Arc;

use containerd_shim_protos::events::task as events_wire;

use super::{Error, Exit, Phase, Task, Tasks};
use crate::{
    containerd::events::{Event, timestamp},
    pod::promptly,
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
        } else if let Some(guest) = &task.guest {
            guest.container.remove(&task.pod).await;
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
            guest.container.run_stopped_hooks().await;
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
