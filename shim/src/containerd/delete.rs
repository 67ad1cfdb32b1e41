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
    pub(crate) async fn delete_exec(&self, task: &Arc<Task>, exec_id: &str) -> Result<Exit, Error> {
        let exec = task.exec(exec_id)?;
        let exit = match exec.process.phase() {
            Phase::Stopped(exit) => {
                exec.process.drain().await;
                // Gone with its container, or with the guest, is as good.
                let _ = promptly(task.pod.agent().delete_process(&task.id, exec_id)).await;
                exit
            }
            Phase::Added => exec.never_run()?,
            phase => return Err(exec.process.refuse("delete", phase)),
        };
        let mut execs = task.execs();
        // Another Delete may have been quicker, and another process of this id may have come since.
        if !execs
            .get(exec_id)
            .is_some_and(|there| Arc::ptr_eq(there, &exec))
        {
            return Err(Error::NotFound("process already deleted".into()));
        }
        execs.remove(exec_id);
        Ok(exit)
    }

    /// Forgets a container that has ended, or one that was never started, with all that it held.
    pub(crate) async fn delete(&self, id: &str) -> Result<(u32, Exit), Error> {
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
            let _ = exec.never_run();
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
        self.leaving.send_modify(|leaving| *leaving += 1);
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
        self.leaving.send_modify(|leaving| *leaving -= 1);
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
