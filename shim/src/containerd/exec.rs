//! Exec processes: written down by Exec, made and run by Start.

use std::sync::Arc;

use containerd_shim_protos::{api::ExecProcessRequest, events::task as events_wire};

use super::{
    Error, Exec, Exit, Phase, Process, Task, Tasks,
    create::{exec_status, join},
};
use crate::{
    containerd::{
        events::Event,
        stdio::{Ends, Names},
    },
    ids, oci,
};

impl Tasks {
    /// Writes an exec process down. Nothing runs.
    pub(super) fn add_exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        ids::check("exec id", &request.exec_id)?;
        let task = self.task(&request.id)?;
        let Some(guest) = &task.guest else {
            return Err(Error::State(format!(
                "container {:?} holds the pod and runs nothing: there is nothing to add a process to",
                request.id
            )));
        };
        let phase = task.init.phase();
        if !matches!(phase, Phase::Created | Phase::Starting | Phase::Running) {
            return Err(task.init.refuse("add a process to it", phase));
        }
        let spec = oci::exec_process(&request.spec.value, &guest.process).map_err(Error::from);
        let mut spec = self.heed(None, &task.id, spec)?;
        spec.terminal = request.terminal;
        let names = Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let exec_id = request.exec_id;
        {
            let mut execs = task.execs();
            if execs.contains_key(&exec_id) || exec_id == task.id {
                let text = format!("there is an exec process {exec_id:?} already");
                return Err(Error::Exists(text));
            }
            let process = Process::new(&exec_id, names, Phase::Added);
            execs.insert(exec_id.clone(), Arc::new(Exec { process, spec }));
        }
        self.events
            .publish(Event::ExecAdded(events_wire::TaskExecAdded {
                container_id: request.id,
                exec_id,
                ..Default::default()
            }));
        Ok(())
    }

    /// Makes an exec process in the guest and lets it run.
    pub(super) async fn start_exec(
        self: &Arc<Self>,
        task: &Arc<Task>,
        exec_id: &str,
    ) -> Result<u32, Error> {
        let exec = task.exec(exec_id)?;
        let init = task.init.phase();
        if !matches!(init, Phase::Running) {
            return Err(task.init.refuse("start a process in it", init));
        }
        task.awake("start a process")?;
        exec.process
            .step(&[Phase::Added], Phase::Starting)
            .map_err(|phase| exec.process.refuse("start", phase))?;
        if let Err(error) = self.run_exec(task, &exec).await {
            // It never ran: its end is told by this error and not by an event; its streams are closed for whoever reads them.
            exec.process.disconnect();
            exec.process.stop(Exit::now(exec_status(&error)));
            return Err(match task.init.exit() {
                Some(exit) => task
                    .init
                    .refuse("start a process in it", Phase::Stopped(exit)),
                None => error,
            });
        }
        let started = Event::ExecStarted(events_wire::TaskExecStarted {
            container_id: task.id.clone(),
            exec_id: exec_id.into(),
            pid: task.pid(),
            ..Default::default()
        });
        exec.process
            .step_and(&[Phase::Starting], Phase::Running, || {
                self.events.publish(started);
            })
            .map_err(|phase| exec.process.refuse("start", phase))?;
        tokio::spawn(self.clone().attend_exec(task.clone(), exec));
        Ok(task.pid())
    }

    async fn run_exec(&self, task: &Arc<Task>, exec: &Exec) -> Result<(), Error> {
        let ends = Ends::open(&exec.process.names, self.owner(&task.id)).await?;
        let (stdio, streams) = {
            let mut held = task.pod.held().await;
            let held = held.as_mut().ok_or_else(|| task.pod.ended())?;
            join(held, ends).await?
        };
        exec.process.connect(streams);
        let mut spec = exec.spec.clone();
        if let Some((rows, columns)) = exec.process.size() {
            (spec.rows, spec.columns) = (rows.into(), columns.into());
        }
        let guest = task.guest.as_ref().expect("it has exec processes");
        let input = || exec.process.open_input();
        guest
            .container
            .exec(&task.pod, &exec.process.exec_id, spec, stdio, input)
            .await
    }
}
