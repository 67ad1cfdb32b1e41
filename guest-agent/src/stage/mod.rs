//! The child's side of a container's making: this binary again, in a process of its own, from clone3 to execve.
//!
//! A stage runs a list of named steps; the first that fails is reported to the agent by name and ends the process. The rules of
//! this folder:
//!
//! - One thread and no Tokio: only then may it enter user and mount namespaces.
//! - Descriptors 0 to 2 are the container's streams. What the agent gives beside them lies at fixed numbers (`message::*_FD`), is taken
//!   once, and is closed by the exec: a last step marks everything from `CONTROL_FD` on.
//! - It reads its request from the agent and nothing else of the agent's. After execve the process is the container's own and is not
//!   trusted with anything; what it says before, the agent takes from a bounded message.
//! - The agent (`container`) calls the stage, never the other way.

#[cfg(test)]
mod fuzz;
mod hooks;
pub(crate) mod message;
pub(crate) mod mounts;
mod paths;
mod pause;
pub(crate) mod plan;
mod program;
mod schedule;
mod security;
mod step;
pub(crate) mod terminal;

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use bulkhead_agent_protocol::agent;
use nix::sched::{setns, unshare};
use protobuf::Message;

use self::message::{Failure, FailureKind, FromStage};
use self::mounts::{Entered, MountError, Prepared, Sources};
use self::paths::Missing;
use self::plan::Plan;
use self::program::Program;
use self::step::Step;

/// Argument that makes this binary the init of a container.
pub const INIT: &CStr = c"init-stage";
/// Argument that makes it an exec process of a container.
pub const EXEC: &CStr = c"exec-stage";
/// Argument that makes it the process that holds the pod's pid namespace.
pub const PAUSE: &CStr = c"pause-stage";

/// Index of lo in every network namespace.
const LO: u32 = 1;

/// The umask of a process whose spec has none.
const DEFAULT_UMASK: u32 = 0o022;

/// Runs the stage of that name and never returns; `None` when there is no such stage.
pub fn dispatch(name: &CStr) -> Option<Never> {
    let run: fn() -> Result<Never, Failure> = match name {
        _ if name == INIT => run_init,
        _ if name == EXEC => run_exec,
        _ if name == PAUSE => pause::run,
        _ => return None,
    };
    // A panic is reported like any failure: the standard streams are the container's.
    std::panic::set_hook(Box::new(|panic| {
        give_up(&Failure::internal(format!("{panic}")))
    }));
    match run() {
        Ok(never) => match never {},
        Err(failure) => give_up(&failure),
    }
}

/// Reports a failure and ends the process.
fn give_up(failure: &Failure) -> ! {
    // The agent may be gone; then nobody is left to tell.
    let _ = message::send_to_agent(channel(), &FromStage::Failed(failure.clone()));
    // Nothing here needs a destructor, and after a panic none may run.
    linux::process::exit_now(failure.exit_code())
}

/// A stage never returns.
pub type Never = std::convert::Infallible;

/// A named step of a stage.
type NamedStep<T> = (&'static str, fn(&mut T) -> Result<(), Failure>);

fn run_steps<T>(stage: &mut T, steps: &[NamedStep<T>]) -> Result<(), Failure> {
    for (name, step) in steps {
        step(stage).map_err(|failure| Failure {
            text: format!("{name}: {}", failure.text),
            ..failure
        })?;
    }
    Ok(())
}

/// The socket to the agent.
#[allow(unsafe_code)] // a number becomes a descriptor
fn channel() -> BorrowedFd<'static> {
    // SAFETY: the agent has put it there before execve; nothing here owns it, and only the next
    // execve closes it.
    unsafe { BorrowedFd::borrow_raw(message::CONTROL_FD) }
}

/// Takes ownership of a descriptor that the agent has put at a fixed number; once for each.
#[allow(unsafe_code)] // a number becomes a descriptor
fn take_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: the agent's dup2 before execve made this descriptor for the stage, and each number is taken once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Writes what [`read_spec`] reads: a number (for exec the namespaces to join, for init how many sources are passed), then
/// the message.
pub fn encode_spec<M: Message>(number: u64, message: &M) -> protobuf::Result<Vec<u8>> {
    let mut bytes = number.to_ne_bytes().to_vec();
    message.write_to_vec(&mut bytes)?;
    Ok(bytes)
}

/// Reads the spec and closes its descriptor.
fn read_spec<M: Message>() -> Result<(u64, M), Failure> {
    let mut file = File::from(take_fd(message::SPEC_FD));
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .step(|| "cannot rewind the spec")?;
    file.read_to_end(&mut bytes)
        .step(|| "cannot read the spec")?;
    let (number, message) = bytes
        .split_first_chunk::<8>()
        .ok_or_else(|| Failure::internal("the spec is too short"))?;
    let message = M::parse_from_bytes(message)
        .map_err(|error| Failure::internal(format!("cannot decode the spec: {error}")))?;
    Ok((u64::from_ne_bytes(*number), message))
}

/// Everything of a stage up to the agent's Start is common to init and exec from here on.
fn enter_program(
    process: &agent::Process,
    before: impl FnOnce() -> Result<(), Failure>,
) -> Result<Never, Failure> {
    let program = Program::new(process)?;
    program.look()?;
    message::send_to_agent(channel(), &FromStage::Ready).step(|| "cannot report to the agent")?;
    if !message::wait_for_start(channel()).step(|| "cannot wait for the start")? {
        return Err(Failure::internal(
            "the agent gave the process up before its start",
        ));
    }
    before()?;
    linux::process::reset_signals();
    security::finish(process)?;
    Err(program.execute())
}

/// The init process of a container.
struct Init {
    request: agent::CreateContainerRequest,
    plan: Plan,
    /// How many sources the agent has opened.
    passed: u64,
    root: Root,
}

/// How far the container's file system is.
enum Root {
    Unmade,
    Prepared(Prepared),
    Entered(Entered),
    Sealed,
}

impl Init {
    fn spec(&self) -> &agent::Container {
        &self.request.spec
    }

    fn process(&self) -> &agent::Process {
        &self.request.spec.process
    }
}

/// The agent's /proc is in sight until "root"; the container's files count from "mounts" on; privileges end with "user".
const INIT_STEPS: &[NamedStep<Init>] = &[
    ("time namespace", |init| time_namespace(init)),
    ("hide", |_| security::hide()),
    ("session", |_| security::new_session()),
    ("cgroup namespace", |init| {
        unshare_if_new(&init.plan, libc::CLONE_NEWCGROUP)
    }),
    ("host name", |init| host_name(init)),
    ("loopback", |init| loopback(init)),
    ("sysctls", |init| sysctls(init)),
    ("mounts", prepare_root),
    ("root", enter_root),
    ("working directory", make_cwd),
    ("terminal", set_up_init_terminal),
    ("seal", seal_root),
    ("scheduling", |init| schedule::apply(init.process())),
    ("terminal's owner", |init| own_terminal(init.process())),
    ("descriptors", |_| close_descriptors()),
    ("user", |init| enter_user(init.process())),
];

fn run_init() -> Result<Never, Failure> {
    let (passed, request): (u64, agent::CreateContainerRequest) = read_spec()?;
    let plan = Plan::new(&request.spec.namespaces).map_err(Failure::invalid)?;
    let mut init = Init {
        request,
        plan,
        passed,
        root: Root::Unmade,
    };
    run_steps(&mut init, INIT_STEPS)?;
    enter_program(init.process(), || {
        hooks::run(&init.spec().start_container_hooks, &init.spec().hook_state)
    })
}

/// An exec process; the agent has chosen what it joins.
struct Exec {
    request: agent::CreateExecRequest,
}

const EXEC_STEPS: &[NamedStep<Exec>] = &[
    ("terminal", set_up_exec_terminal),
    ("scheduling", |exec| schedule::apply(&exec.request.process)),
    ("terminal's owner", |exec| {
        own_terminal(&exec.request.process)
    }),
    ("descriptors", |_| close_descriptors()),
    ("user", |exec| enter_user(&exec.request.process)),
];

fn run_exec() -> Result<Never, Failure> {
    // Hidden before it enters: from then on the container's processes can see it.
    security::hide()?;
    let (joins, request): (u64, agent::CreateExecRequest) = read_spec()?;
    security::new_session()?;
    let init = take_fd(message::INIT_PIDFD);
    setns(&init, plan::clone_flags(joins))
        .step(|| "cannot enter the container's namespaces, has its init exited?")?;
    drop(init);
    if joins & libc::CLONE_NEWUSER as u64 != 0 {
        // The agent's user is not mapped inside; what follows is done as the container's root.
        linux::thread::set_groups(&[]).step(|| "cannot leave the agent's groups")?;
        security::set_ids(0, 0).step(|| "cannot become root of the container's user namespace")?;
    }
    let mut exec = Exec { request };
    run_steps(&mut exec, EXEC_STEPS)?;
    enter_program(&exec.request.process, || Ok(()))
}

fn unshare_if_new(plan: &Plan, flag: libc::c_int) -> Result<(), Failure> {
    if !plan.is_new(flag as u64) {
        return Ok(());
    }
    unshare(plan::clone_flags(flag as u64)).step(|| "cannot make the namespace")
}

/// The offsets can be set only while no process is in the namespace: execve moves this one there (time_namespaces(7)).
fn time_namespace(init: &Init) -> Result<(), Failure> {
    unshare_if_new(&init.plan, libc::CLONE_NEWTIME)?;
    let namespaces = &init.spec().namespaces;
    let clocks = [
        ("monotonic", namespaces.monotonic.as_ref()),
        ("boottime", namespaces.boottime.as_ref()),
    ];
    for (clock, offset) in clocks
        .into_iter()
        .filter_map(|(clock, offset)| Some((clock, offset?)))
    {
        let line = format!("{clock} {} {}", offset.secs, offset.nanosecs);
        std::fs::write("/proc/self/timens_offsets", &line)
            .step(|| format!("cannot set the offset \"{line}\""))?;
    }
    Ok(())
}

fn host_name(init: &Init) -> Result<(), Failure> {
    let spec = init.spec();
    if (!spec.hostname.is_empty() || !spec.domainname.is_empty()) && !init.plan.own_uts() {
        return Err(Failure::invalid(
            "a host or domain name needs a UTS namespace: it would rename the guest",
        ));
    }
    if !spec.hostname.is_empty() {
        nix::unistd::sethostname(&spec.hostname)
            .step(|| format!("cannot set host name \"{}\"", spec.hostname))?;
    }
    if !spec.domainname.is_empty() {
        linux::process::set_domain_name(&spec.domainname)
            .step(|| format!("cannot set domain name \"{}\"", spec.domainname))?;
    }
    Ok(())
}

fn loopback(init: &Init) -> Result<(), Failure> {
    if !init.plan.new_network() {
        return Ok(());
    }
    linux::netlink::bring_up(LO)
        .map_err(|refusal| Failure::internal(format!("cannot bring lo up: {refusal}")))
}

/// Through the agent's /proc, where no mount of the container can stand in the way; the kernel takes the namespace of the writer.
fn sysctls(init: &Init) -> Result<(), Failure> {
    for (name, value) in &init.spec().sysctls {
        crate::machine::write_sysctl(name, value).map_err(Failure::internal)?;
    }
    Ok(())
}

/// With a user namespace the agent has opened the sources, because this process may not; else they are opened here,
/// where a share that does not answer stops nobody else.
fn prepare_root(init: &mut Init) -> Result<(), Failure> {
    let spec = init.spec();
    let sources = if init.plan.new_user() {
        let fds = (message::FIRST_SOURCE_FD..)
            .take(init.passed as usize)
            .map(take_fd)
            .collect();
        Sources::from_fds(spec, fds)
    } else {
        Sources::open(spec)
    };
    let prepared = sources
        .and_then(|sources| mounts::prepare(spec, sources))
        .map_err(mount_failure)?;
    init.root = Root::Prepared(prepared);
    Ok(())
}

fn enter_root(init: &mut Init) -> Result<(), Failure> {
    let Root::Prepared(prepared) = std::mem::replace(&mut init.root, Root::Unmade) else {
        return Err(Failure::internal("the root is not prepared"));
    };
    init.root = Root::Entered(prepared.enter_root().map_err(mount_failure)?);
    Ok(())
}

/// Images name working directories that they do not contain; engines expect them to be made.
fn make_cwd(init: &mut Init) -> Result<(), Failure> {
    if let Root::Entered(entered) = &init.root {
        // A read-only root or a file in the way is reported when the directory is entered.
        let _ = entered
            .root()
            .resolve_or_create(Path::new(&init.process().cwd), Missing::Directory);
    }
    Ok(())
}

fn set_up_init_terminal(init: &mut Init) -> Result<(), Failure> {
    if !init.process().terminal {
        return Ok(());
    }
    let Root::Entered(entered) = &init.root else {
        return Err(Failure::internal("the root is not entered"));
    };
    terminal::set_up(init.process(), |terminal| {
        entered.bind_console(terminal).map_err(mount_failure)
    })
}

fn seal_root(init: &mut Init) -> Result<(), Failure> {
    let Root::Entered(entered) = std::mem::replace(&mut init.root, Root::Sealed) else {
        return Err(Failure::internal("the root is not entered"));
    };
    entered.seal(init.spec()).map_err(mount_failure)
}

fn mount_failure(error: MountError) -> Failure {
    Failure::internal(error.to_string())
}

fn set_up_exec_terminal(exec: &mut Exec) -> Result<(), Failure> {
    if !exec.request.process.terminal {
        return Ok(());
    }
    // The console is init's.
    terminal::set_up(&exec.request.process, |_| Ok(()))
}

/// Gives the terminal to the user, as login(1) does; pipes have been made for the user by the agent.
fn own_terminal(process: &agent::Process) -> Result<(), Failure> {
    if !process.terminal {
        return Ok(());
    }
    nix::unistd::fchown(io::stdin(), Some(process.uid.into()), None)
        .step(|| format!("cannot give the terminal to user {}", process.uid))
}

/// Nothing but the streams and the control socket outlives this, and the socket ends with execve.
fn close_descriptors() -> Result<(), Failure> {
    linux::descriptor::close_on_exec_from(message::CONTROL_FD).step(|| "cannot mark descriptors")
}

/// Ids and the working directory: entered as root first, because the user may not be able to reach it; as the user
/// when root may not either (a share that maps root to nobody).
fn enter_user(process: &agent::Process) -> Result<(), Failure> {
    let cwd = if process.cwd.is_empty() {
        "/"
    } else {
        &process.cwd
    };
    let umask = u32::try_from(process.umask).unwrap_or(DEFAULT_UMASK);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    let entered = nix::unistd::chdir(cwd);
    security::become_user(process)?;
    if entered == Err(nix::Error::EACCES) {
        nix::unistd::chdir(cwd).step(|| enter_message(cwd))?;
    } else if let Err(errno) = entered {
        return Err(Failure {
            kind: FailureKind::Invalid,
            text: format!("{}: {}", enter_message(cwd), io::Error::from(errno)),
        });
    }
    inside_root(cwd)
}

fn enter_message(cwd: &str) -> String {
    format!("cannot enter the working directory \"{cwd}\"")
}

/// A directory of another root (by a magic link in /proc) would be a way out of the container.
fn inside_root(cwd: &str) -> Result<(), Failure> {
    let path = linux::process::working_directory().step(|| enter_message(cwd))?;
    if path.first() != Some(&b'/') {
        return Err(Failure::invalid(format!(
            "the working directory \"{cwd}\" lies outside the container's root"
        )));
    }
    Ok(())
}
