//! `containerd.runtime.sandbox.v1.Sandbox`: the pod itself as a service. Requests in, the pod, answers out; what asks about it is
//! answered from the shim's own knowledge and the host's, never by the guest.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api as api,
    sandbox_async::{Sandbox as SandboxService, create_sandbox},
    types::platform::Platform,
};
use ttrpc::r#async::{Service, TtrpcContext};

use super::{Phase, Tasks, error::to_the_end};
use crate::containerd::events::{any, timestamp};

/// Kubernetes' words for a pod's state (`runtime.v1.PodSandboxState`), by which containerd knows it.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service, for a server.
pub(super) fn service(tasks: &Arc<Tasks>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(Front(tasks.clone())))
}

/// What containerd calls.
struct Front(Arc<Tasks>);

#[async_trait]
impl SandboxService for Front {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        self.0.create_sandbox(&request)?;
        Ok(api::CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let tasks = self.0.clone();
        let started = async move { tasks.start_sandbox(&request.sandbox_id).await };
        let sandbox = to_the_end(started).await?;
        Ok(api::StartSandboxResponse {
            pid: sandbox.pid(),
            created_at: timestamp(sandbox.created),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        self.0.sandbox(&request.sandbox_id)?;
        // The guest's: that of the host, whose processor it runs on.
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Default::default()
        };
        Ok(api::PlatformResponse {
            platform: Some(platform).into(),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        let tasks = self.0.clone();
        let stopped = async move {
            let sandbox = tasks.sandbox(&request.sandbox_id)?;
            let secs = Some(request.timeout_secs).filter(|secs| *secs > 0);
            let limit = secs.map(|secs| Duration::from_secs(secs.into()));
            tasks.stop_sandbox(&sandbox, limit).await
        };
        to_the_end(stopped).await?;
        Ok(api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        let exit = self.0.sandbox(&request.sandbox_id)?.ended().await;
        Ok(api::WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        let sandbox = self.0.sandbox(&request.sandbox_id)?;
        let phase = sandbox.phase();
        let state = match phase {
            Phase::Running => READY,
            _ => NOT_READY,
        };
        let mut status = api::SandboxStatusResponse {
            sandbox_id: sandbox.id.clone(),
            pid: sandbox.pid(),
            state: state.into(),
            created_at: timestamp(sandbox.created),
            ..Default::default()
        };
        if request.verbose {
            status.info = sandbox.info(state);
        }
        if let Phase::Stopped(exit) = phase {
            status.exited_at = timestamp(exit.at);
        }
        Ok(status)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        let sandbox = self.0.sandbox(&request.sandbox_id)?;
        match sandbox.phase() {
            Phase::Running => Ok(api::PingResponse::default()),
            _ => Err(sandbox.refuse("reach").into()),
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        let tasks = self.0.clone();
        to_the_end(async move { tasks.shut_down_sandbox(&request.sandbox_id).await }).await?;
        Ok(api::ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        let sandbox = self.0.sandbox(&request.sandbox_id)?;
        if matches!(sandbox.phase(), Phase::Created | Phase::Starting) {
            return Err(sandbox.refuse("measure").into());
        }
        let used = sandbox.metrics()?;
        let mut answer = api::SandboxMetricsResponse::default();
        let metric = answer.metrics.mut_or_insert_default();
        metric.id = sandbox.id.clone();
        metric.timestamp = timestamp(std::time::SystemTime::now());
        metric.data = Some(any("io.containerd.cgroups.v2", &used)).into();
        Ok(answer)
    }
}
