//! `containerd.task.v2.Task` and `containerd.task.v3.Task`, one service by two names: requests in, tasks, answers out.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use bulkhead_agent_protocol::PROTOCOL_VERSION;
use containerd_shim_protos::{
    api::{self, Empty},
    shim::oci::ProcessDetails,
    shim_async::{Task as TaskService, create_task},
    types::task::{ProcessInfo, Status},
};
use ttrpc::r#async::{Service, TtrpcContext};

use super::{Error, Phase, Process, Task, Tasks, error::to_the_end, sandbox_service};
use crate::containerd::events::{any, timestamp};

/// Both names of the service, and the sandbox service beside them, for a server.
pub fn services(tasks: &Arc<Tasks>) -> HashMap<String, Service> {
    let service = || create_task(Arc::new(Front(tasks.clone())));
    let mut services = service();
    services.extend(sandbox_service::service(tasks));
    // The messages of v2 are those of v3.
    for (name, service) in service() {
        services.insert(name.replace(".v3.", ".v2."), service);
    }
    services
}

/// What containerd calls.
struct Front(Arc<Tasks>);

fn state_of(task: &Task, process: &Process) -> api::StateResponse {
    let names = &process.names;
    let phase = process.phase();
    let mut state = api::StateResponse {
        id: task.id.clone(),
        exec_id: process.exec_id.clone(),
        bundle: task.bundle.to_string_lossy().into_owned(),
        pid: task.pid(),
        stdin: names.stdin.clone(),
        stdout: names.stdout.clone(),
        stderr: names.stderr.clone(),
        terminal: names.terminal,
        status: match phase {
            Phase::Added | Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped(_) => Status::STOPPED,
        }
        .into(),
        ..Default::default()
    };
    if let Phase::Stopped(exit) = phase {
        state.exit_status = exit.status;
        state.exited_at = timestamp(exit.at);
    }
    state
}

#[async_trait]
impl TaskService for Front {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let task = self.0.task(&request.id)?;
        Ok(task.with(&request.exec_id, |process| state_of(&task, process))?)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let pid = to_the_end(self.0.clone().create(request)).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let tasks = self.0.clone();
        let started = async move {
            let task = tasks.task(&request.id)?;
            match request.exec_id.as_str() {
                "" => tasks.start_init(&task).await,
                exec_id => tasks.start_exec(&task, exec_id).await,
            }
        };
        Ok(api::StartResponse {
            pid: to_the_end(started).await?,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let tasks = self.0.clone();
        let deleted = async move {
            match request.exec_id.as_str() {
                "" => tasks.delete(&request.id).await,
                exec_id => {
                    let task = tasks.task(&request.id)?;
                    let exit = tasks.delete_exec(&task, exec_id).await?;
                    Ok((task.pid(), exit))
                }
            }
        };
        let (pid, exit) = to_the_end(deleted).await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let task = self.0.task(&request.id)?;
        let info = |details: Option<ProcessDetails>| ProcessInfo {
            pid: task.pid(),
            info: details
                .map(|details| any("containerd.runc.v1", &details))
                .into(),
            ..Default::default()
        };
        let mut processes = vec![info(None)];
        for exec in task.execs().values() {
            if matches!(exec.process.phase(), Phase::Running | Phase::Starting) {
                processes.push(info(Some(ProcessDetails {
                    exec_id: exec.process.exec_id.clone(),
                    ..Default::default()
                })));
            }
        }
        Ok(api::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        to_the_end(async move { tasks.set_paused(&request.id, true).await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        to_the_end(async move { tasks.set_paused(&request.id, false).await }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Err(Error::Unimplemented("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        let killed = async move {
            let api::KillRequest {
                id,
                exec_id,
                signal,
                all,
                ..
            } = request;
            tasks.kill(&id, &exec_id, signal, all).await
        };
        to_the_end(killed).await?;
        Ok(Empty::default())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.add_exec(request)?;
        Ok(Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        let clamp = |size: u32| size.min(u16::MAX.into()) as u16;
        let (rows, columns) = (clamp(request.height), clamp(request.width));
        let resized = async move {
            tasks
                .resize(&request.id, &request.exec_id, rows, columns)
                .await
        };
        to_the_end(resized).await?;
        Ok(Empty::default())
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        let task = self.0.task(&request.id)?;
        task.with(&request.exec_id, |process| {
            if request.stdin {
                process.close_input();
            }
        })?;
        Ok(Empty::default())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        let json = request.resources.unwrap_or_default().value;
        to_the_end(async move { tasks.update(&request.id, &json).await }).await?;
        Ok(Empty::default())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let task = self.0.task(&request.id)?;
        let exit = match request.exec_id.as_str() {
            "" => task.init.ended().await,
            exec_id => task.exec(exec_id)?.process.ended().await,
        };
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let task = self.0.task(&request.id)?;
        let metrics = match task.guest {
            Some(_) => {
                let usage = &task.usage;
                usage.metrics(&task.pod, &task.id, task.holds_pod).await?
            }
            // By the host alone.
            None => task.usage.metrics_of_pod(&task.pod)?,
        };
        Ok(api::StatsResponse {
            stats: Some(any("io.containerd.cgroups.v2", &metrics)).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        // A member of the pod that is not made yet has no pid.
        let task_pid = self.0.task(&request.id).map_or(0, |task| task.pid());
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: format!("{}-{PROTOCOL_VERSION}", env!("CARGO_PKG_VERSION")),
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        to_the_end(async move { tasks.shut_down(&request.id).await }).await?;
        Ok(Empty::default())
    }
}
