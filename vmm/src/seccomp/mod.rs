//! The system calls that each thread may make once a guest's words can reach it.
//!
//! [`calls`] is the one list: which call, by which threads, with which arguments, and why.
//! [`spawn`] starts a thread that has its filter before it does its work; [`lock_down`] gives the
//! calling thread its own. All threads are there before the guest's first instruction, so that no
//! list has a call that starts one.
//!
//! A call that is not on the list is not made. The kernel raises SIGSYS in the thread instead
//! (seccomp(2), `SECCOMP_RET_TRAP`), and [`blocked`] tells the shim which thread made which call
//! and ends the process. A thread that blocks or ignores SIGSYS is killed by the kernel.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use bulkhead_vmm_config::{CONTROL_FD, ExitCode, Role};
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use thiserror::Error;
use vmm_sys_util::signal::register_signal_handler;

pub mod calls;

/// A thread could not be confined; the process must not go on.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The list is wrong: a bug.
    #[error("the system call filter of the role {0} cannot be built")]
    Build(Role, #[source] BackendError),
    /// The kernel refuses it.
    #[error(
        "the kernel refuses the system call filter of the role {0}; is CONFIG_SECCOMP_FILTER set?"
    )]
    Install(Role, #[source] seccompiler::Error),
    /// The handler of SIGSYS.
    #[error("the handler of refused system calls cannot be installed")]
    Handler(#[source] vmm_sys_util::errno::Error),
    /// No thread.
    #[error("the thread {name} cannot be started; is the number of processes limited?")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the thread does before its filter.
    #[error("the thread {name} cannot be made ready")]
    Prepare {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

thread_local! {
    /// What the current thread is, for [`blocked`].
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// Gives all threads one heap: glibc opens a file of `/proc` when it shrinks another one. Call it
/// before the first thread.
pub fn one_heap() {
    // SAFETY: mallopt takes no pointers. It cannot fail with this number.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Installs the handler of refused calls, for the process, and takes std's handler of crashes away.
/// Call it before the first filter.
///
/// # Errors
/// sigaction(2)'s.
pub fn report_blocked() -> Result<(), SeccompError> {
    // SAFETY: SIG_DFL is no handler of ours.
    unsafe {
        // std's handler looks for stack overflows, and calls sigaction(2): a crash would be told as
        // a refused call.
        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
    register_signal_handler(libc::SIGSYS, blocked).map_err(SeccompError::Handler)
}

/// Confines the calling thread to the calls of `role`, for good.
///
/// # Errors
/// The kernel has no filters.
pub fn lock_down(role: Role) -> Result<(), SeccompError> {
    install(role, &program(role)?)
}

/// Starts a thread named `name` that runs `prepare`, takes the filter of `role` and runs `work`. It
/// has the filter when this returns; joining it gives what `work` gave.
///
/// # Errors
/// Those of a new thread, of `prepare` and of [`lock_down`].
pub fn spawn<P, T: Send + 'static>(
    name: String,
    role: Role,
    prepare: impl FnOnce() -> io::Result<P> + Send + 'static,
    work: impl FnOnce(P) -> T + Send + 'static,
) -> Result<JoinHandle<Option<T>>, SeccompError> {
    let program = program(role)?;
    let (tell, told) = mpsc::sync_channel(1);
    let preparing = name.clone();
    let body = move || {
        let ready = prepare().map_err(|source| SeccompError::Prepare {
            name: preparing,
            source,
        });
        let ready = ready.and_then(|prepared| install(role, &program).map(|()| prepared));
        // Whoever started the thread waits for the answer.
        match ready {
            Ok(prepared) => {
                let _ = tell.send(Ok(()));
                drop((tell, program));
                Some(work(prepared))
            }
            Err(error) => {
                let _ = tell.send(Err(error));
                None
            }
        }
    };
    let thread = thread::Builder::new().name(name.clone()).spawn(body);
    let thread = thread.map_err(|source| SeccompError::Thread {
        name: name.clone(),
        source,
    })?;
    match told.recv() {
        Ok(answer) => answer.map(|()| thread),
        Err(_) => Err(SeccompError::Prepare {
            name,
            source: io::Error::other("it has ended"),
        }),
    }
}

fn program(role: Role) -> Result<BpfProgram, SeccompError> {
    let build = || -> Result<BpfProgram, BackendError> {
        let (refused, listed) = (SeccompAction::Trap, SeccompAction::Allow);
        SeccompFilter::new(calls::rules(role)?, refused, listed, TargetArch::x86_64)?.try_into()
    };
    build().map_err(|error| SeccompError::Build(role, error))
}

fn install(role: Role, program: &BpfProgram) -> Result<(), SeccompError> {
    ROLE.set(Some(role));
    seccompiler::apply_filter(program).map_err(|error| SeccompError::Install(role, error))
}

/// The handler of SIGSYS. Everything in it is safe in a signal handler: no memory is allocated, no
/// lock is taken.
extern "C" fn blocked(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// sigaction(2): a filter refused a call.
    const SYS_SECCOMP: libc::c_int = 1;
    /// sigaction(2): `si_syscall` follows three ints, padding and `si_call_addr`.
    const SI_SYSCALL: usize = 24;
    // SAFETY: the kernel passes a siginfo_t that lives until the handler returns.
    let code = unsafe { (*info).si_code };
    // SAFETY: as above; with this signal and the code that is checked below, an int is at this
    // offset of its 128 bytes.
    let call = unsafe { *info.cast::<u8>().add(SI_SYSCALL).cast::<libc::c_int>() };
    if code == SYS_SECCOMP
        && let Some(role) = ROLE.get()
    {
        let mut packet = [0; 64];
        let mut rest = &mut packet[..];
        // It fits: the longest role has ten letters, and a call ten digits.
        let _ = write!(rest, r#"{{"blocked":{{"role":"{role}","call":{call}}}}}"#);
        let left = rest.len();
        let length = packet.len() - left;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the packet is alive. A shim that is gone or does not read hears nothing, and the
        // process ends all the same.
        unsafe {
            libc::send(CONTROL_FD, packet.as_ptr().cast(), length, flags);
        }
    }
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(ExitCode::Blocked as i32) };
}
