//! One life of a container in a pod, the same for every front end.
//!
//! ```text
//! place ──► run_create_hooks ──► create ──► start (poststart hooks) ──► its end ──► remove ──► run_stopped_hooks
//!   files in the share           stands before its exec                 streams are the front end's
//! ```
//!
//! Where hooks fail is decided here, as OCI runtime.md#lifecycle has it: createRuntime and poststart hooks end the container, poststop
//! hooks are logged.

use std::{collections::HashMap, path::PathBuf};

use bulkhead_agent_protocol::agent as wire;

use super::{Error, Held, Pod, layers::Layer, promptly};
use crate::{
    hooks::{self, State},
    oci::{HostHooks, Plan},
};

/// What is kept of a container's configuration after its files are placed.
#[derive(Debug)]
pub struct Container {
    /// Unique in the pod.
    pub id: String,
    /// The directory of config.json.
    pub bundle: PathBuf,
    hooks: HostHooks,
    oci_version: String,
    annotations: HashMap<String, String>,
}

impl Container {
    /// The container that `plan` describes.
    pub fn new(id: &str, bundle: PathBuf, plan: &Plan) -> Container {
        Container {
            id: id.into(),
            bundle,
            hooks: plan.hooks.clone(),
            oci_version: plan.oci_version.clone(),
            annotations: plan.annotations.clone(),
        }
    }

    /// Whether a hook is told a pid: somebody has to stand for the pod then.
    pub fn has_hooks(&self) -> bool {
        !self.hooks.create.is_empty() || !self.hooks.started.is_empty()
    }

    /// Mounts the container's root, if the engine has not, puts its files into the share, and writes their places into `plan`. The guest
    /// need not be ready.
    pub async fn place(
        &self,
        held: &mut Held,
        plan: &mut Plan,
        layers: &[Layer],
    ) -> Result<(), Error> {
        held.place(&self.id, plan, layers).await
    }

    /// Runs the createRuntime hooks; `pid` stands for the pod. They may add interfaces to the pod's network, which [`Container::create`] finds.
    pub async fn run_create_hooks(&self, pid: Option<i32>) -> Result<(), Error> {
        let state = self.state("creating", pid);
        Ok(hooks::run("createRuntime", &self.hooks.create, &state).await?)
    }

    /// Makes the placed container in the guest, up to the point before its exec.
    pub async fn create(
        &self,
        pod: &Pod,
        mut spec: wire::Container,
        stdio: wire::Stdio,
    ) -> Result<(), Error> {
        if pod.plan.paths.alone || !self.hooks.create.is_empty() {
            pod.find_interfaces().await?;
        }
        // In the guest the process is the first of its own pid namespace.
        let state = self.state("created", Some(1));
        spec.hook_state =
            serde_json::to_vec(&state).expect("a state is made of strings and numbers");
        tokio::select! {
            created = pod.access.create_container(&self.id, spec, stdio) => created,
            error = pod.access.trouble() => Err(error),
        }
    }

    /// Lets the init exec, then calls `open_input`: what is sent to it earlier goes to whoever has dialled the stream, if the agent has
    /// not. Then the poststart hooks run.
    ///
    /// # Errors
    /// The init has been killed, if the guest answers within 10 s: it never ran, lacks its input, or a poststart hook failed.
    pub async fn start<E: From<Error>>(
        &self,
        pod: &Pod,
        open_input: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let started = match pod.agent().start(&self.id).await {
            Ok(()) => open_input(),
            Err(error) => Err(pod.access.explain(error).await.into()),
        };
        let started = match started {
            Ok(()) => self.run_started_hooks(pod).await.map_err(E::from),
            Err(error) => Err(error),
        };
        if started.is_err() {
            let _ = promptly(pod.agent().signal(&self.id, libc::SIGKILL)).await;
        }
        started
    }

    async fn run_started_hooks(&self, pod: &Pod) -> Result<(), Error> {
        let state = self.state("running", Some(pod.pid));
        Ok(hooks::run("poststart", &self.hooks.started, &state).await?)
    }

    /// Makes a further process in the container and lets it run; `open_input` as for [`Container::start`].
    ///
    /// # Errors
    /// It does not run, and the agent has forgotten it.
    pub async fn exec<E: From<Error>>(
        &self,
        pod: &Pod,
        exec_id: &str,
        spec: wire::Process,
        stdio: wire::Stdio,
        open_input: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let request = wire::CreateExecRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            process: Some(spec).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let agent = pod.agent();
        agent.create_exec(&request).await.map_err(Error::from)?;
        let started = match agent.start_process(&self.id, exec_id).await {
            Ok(()) => open_input(),
            Err(error) => Err(Error::from(error).into()),
        };
        if started.is_err() {
            // It may run, without the input that it was to have. One that did not start has ended, or is about to.
            let kill = libc::SIGKILL.unsigned_abs();
            let _ = agent.signal_process(&self.id, exec_id, kill, false).await;
            // Only then can the agent forget it.
            if agent.wait_process(&self.id, exec_id).await.is_ok() {
                let _ = agent.delete_process(&self.id, exec_id).await;
            }
        }
        started
    }

    /// Takes the container's traces out of a pod that goes on. Errors are logged: what is left is in the ledger, and goes with the pod.
    pub async fn remove(&self, pod: &Pod) {
        if let Err(error) = promptly(pod.agent().delete(&self.id)).await {
            // A container that was never made, or a guest that does not answer: the host lets go all the same.
            tracing::debug!(container = %self.id, error = %error.text(), "not deleted in the guest");
        }
        pod.leave(&self.id);
        pod.release(&self.id).await;
        let mut held = pod.held().await;
        if let Some(held) = held.as_mut()
            && let Err(error) = held.withdraw(&self.id).await
        {
            tracing::error!(container = %self.id, error = %error.text(), "its files stay in the share until the pod ends");
        }
    }

    /// Runs the poststop hooks. One that fails is logged and changes nothing.
    pub async fn run_stopped_hooks(&self) {
        let state = self.state("stopped", None);
        if let Err(error) = hooks::run("poststop", &self.hooks.stopped, &state).await {
            tracing::warn!("{error}");
        }
    }

    /// What a hook reads of the container (OCI runtime.md#state).
    fn state<'a>(&'a self, status: &'a str, pid: Option<i32>) -> State<'a> {
        State {
            oci_version: &self.oci_version,
            id: &self.id,
            status,
            pid,
            bundle: &self.bundle,
            annotations: &self.annotations,
        }
    }
}
