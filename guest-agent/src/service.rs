//! The RPCs of agent.proto, each a call into the sandbox.
//!
//! Each runs as a task of its own: a caller that gives up must not leave a container half made.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_agent_protocol::{agent, agent_ttrpc};
use ttrpc::r#async::TtrpcContext;

use crate::error::Error;
use crate::sandbox::Sandbox;

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct Service(pub(crate) Arc<Sandbox>);

/// Runs to the end even if the caller goes away.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    let result = tokio::spawn(work)
        .await
        .expect("a panic ends the agent, and the task is never aborted");
    result.map_err(ttrpc::Error::from)
}

fn empty<T>(result: Result<T, ttrpc::Error>) -> ttrpc::Result<agent::Empty> {
    result.map(|_| agent::Empty::new())
}

fn created(made: Result<u32, Error>) -> Result<agent::CreateProcessResponse, Error> {
    match made {
        Ok(pid) => Ok(agent::CreateProcessResponse {
            pid,
            ..Default::default()
        }),
        Err(error) => {
            error
                .into_program_problem()
                .map(|(problem, reason)| agent::CreateProcessResponse {
                    problem: problem.into(),
                    reason,
                    ..Default::default()
                })
        }
    }
}

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: agent::StartSandboxRequest,
    ) -> ttrpc::Result<agent::StartSandboxResponse> {
        let sandbox = Arc::clone(&self.0);
        to_the_end(async move { sandbox.start(request).await }).await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<agent::CreateProcessResponse> {
        let sandbox = Arc::clone(&self.0);
        to_the_end(async move { created(sandbox.create_container(request).await) }).await
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: agent::CreateExecRequest,
    ) -> ttrpc::Result<agent::CreateProcessResponse> {
        let sandbox = Arc::clone(&self.0);
        to_the_end(async move { created(sandbox.create_exec(request).await) }).await
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::StartProcessResponse> {
        let sandbox = Arc::clone(&self.0);
        let started = to_the_end(async move {
            match sandbox.start_process(&request).await {
                Ok(pid) => Ok(agent::StartProcessResponse {
                    pid,
                    ..Default::default()
                }),
                Err(error) => error.into_program_problem().map(|(problem, reason)| {
                    agent::StartProcessResponse {
                        problem: problem.into(),
                        reason,
                        ..Default::default()
                    }
                }),
            }
        });
        started.await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::WaitProcessResponse> {
        let (exit, [stdout_bytes, stderr_bytes]) = self.0.wait_process(&request).await?;
        Ok(agent::WaitProcessResponse {
            exit_status: exit.status,
            signal: exit.signal,
            exited_at_ns: exit.at_ns,
            oom_killed: exit.oom_killed,
            stdout_bytes,
            stderr_bytes,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: agent::SignalProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.signal_process(&request).await }).await)
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: agent::ResizeTerminalRequest,
    ) -> ttrpc::Result<agent::Empty> {
        empty(self.0.resize_terminal(&request).map_err(ttrpc::Error::from))
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.delete_process(&request).await }).await)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ListProcessesResponse> {
        let pids = self.0.list_processes(&request.container_id).await?;
        Ok(agent::ListProcessesResponse {
            pids,
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ContainerStatsResponse> {
        let files = self.0.container_stats(&request.container_id).await?;
        Ok(agent::ContainerStatsResponse {
            files,
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(
            to_the_end(async move { sandbox.set_frozen(&request.container_id, true).await }).await,
        )
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(
            to_the_end(async move { sandbox.set_frozen(&request.container_id, false).await }).await,
        )
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.update_container(request).await }).await)
    }

    async fn reclaim_memory(
        &self,
        _: &TtrpcContext,
        request: agent::ReclaimMemoryRequest,
    ) -> ttrpc::Result<agent::ReclaimMemoryResponse> {
        let bytes = self.0.reclaim_memory(request.bytes).await;
        Ok(agent::ReclaimMemoryResponse {
            bytes,
            ..Default::default()
        })
    }

    async fn set_processors(
        &self,
        _: &TtrpcContext,
        request: agent::SetProcessorsRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.set_processors(request.count).await }).await)
    }

    async fn create_volume(
        &self,
        _: &TtrpcContext,
        request: agent::VolumeRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.create_volume(request.volume).await }).await)
    }

    async fn change_volume(
        &self,
        _: &TtrpcContext,
        request: agent::ChangeVolumeRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.change_volume(request).await }).await)
    }

    async fn delete_volume(
        &self,
        _: &TtrpcContext,
        request: agent::VolumeRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.delete_volume(request.volume).await }).await)
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: agent::Network,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.configure_network(request).await }).await)
    }

    async fn watch_listeners(
        &self,
        _: &TtrpcContext,
        request: agent::Listeners,
    ) -> ttrpc::Result<agent::Listeners> {
        Ok(self.0.watch_listeners(&request).await?)
    }

    async fn connect_listener(
        &self,
        _: &TtrpcContext,
        request: agent::ConnectListenerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.connect_listener(&request).await }).await)
    }

    async fn serve_socket(
        &self,
        _: &TtrpcContext,
        request: agent::ServeSocketRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { Ok(sandbox.sockets.serve(request).await?) }).await)
    }

    async fn stop_socket(
        &self,
        _: &TtrpcContext,
        request: agent::SocketRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        let stop = async move {
            sandbox.sockets.stop(request.socket).await;
            Ok(())
        };
        empty(to_the_end(stop).await)
    }

    async fn end_sockets(
        &self,
        _: &TtrpcContext,
        request: agent::EndSocketsRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        let end = async move {
            sandbox.end_sockets(request.place).await;
            Ok(())
        };
        empty(to_the_end(end).await)
    }

    async fn next_connection(
        &self,
        _: &TtrpcContext,
        _: agent::Empty,
    ) -> ttrpc::Result<agent::SocketConnection> {
        let (socket, connection) = self.0.sockets.next().await;
        Ok(agent::SocketConnection {
            socket,
            connection,
            ..Default::default()
        })
    }

    async fn answer_connection(
        &self,
        _: &TtrpcContext,
        request: agent::AnswerConnectionRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        empty(to_the_end(async move { sandbox.answer_connection(&request).await }).await)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: agent::Empty) -> ttrpc::Result<agent::Empty> {
        let sandbox = Arc::clone(&self.0);
        // Shutting down blocks until everything is dead; not on the thread that the answer needs.
        std::thread::spawn(move || sandbox.shut_down());
        Ok(agent::Empty::new())
    }
}
