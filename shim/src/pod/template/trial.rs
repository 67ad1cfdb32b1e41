//! A container in the first machine that goes on from a template: what it touches of a guest,
//! every container does.

use std::{fs, io, path::Path};

use oci_spec::runtime::{RootBuilder, Spec};
use tokio::time::timeout;

use super::super::{Error, Sandbox};
use crate::{
    error::line,
    oci::{self, Bundle, Plan},
};

const ID: &str = "trial";
/// In its root: a program that needs no other file.
const PROGRAM: &str = "program";

/// What engines' containers have, with a program that prints a line.
fn plan(root: &Path) -> Result<Plan, Box<dyn std::error::Error>> {
    let mut spec = Spec::default();
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(vec![format!("/{PROGRAM}"), "--version".into()]));
    spec.set_process(Some(process))
        .set_root(Some(RootBuilder::default().path(root).build()?));
    let directory = root.into();
    Ok(oci::plan(&Bundle { directory, spec }, ID)?)
}

/// Runs it to its end; its root is made at `root` of the VMM's program, and stays.
///
/// # Errors
/// It was not made, or did not end well: pods would fare no better.
pub(super) async fn run(sandbox: &mut Sandbox, root: &Path, program: &Path) -> Result<(), Error> {
    let make = || -> io::Result<()> {
        fs::create_dir(root)?;
        fs::copy(program, root.join(PROGRAM)).map(drop)
    };
    make().map_err(|source| Error::Store {
        action: "try",
        path: root.into(),
        source,
    })?;
    let plan = plan(root).map_err(|error| Error::Trial(line(&*error)))?;
    let limit = sandbox.boot_timeout;
    let access = sandbox.access();
    let ran = async {
        sandbox.place_container(ID, &plan).await?;
        let (stdio, _output) = sandbox.streams([false, true, true]).await?;
        sandbox
            .create_container(ID, plan.container.clone(), stdio)
            .await?;
        let agent = sandbox.agent();
        agent.start(ID).await?;
        let ended = agent.wait(ID).await?;
        match ended.exit_status {
            0 => sandbox.remove_container(ID).await,
            status => Err(Error::Trial(format!("it ended with status {status}"))),
        }
    };
    tokio::select! {
        ran = timeout(limit, ran) => ran.unwrap_or(Err(Error::Hung(limit.as_secs()))),
        error = access.trouble() => Err(error),
    }
}
