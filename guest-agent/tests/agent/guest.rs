//! A guest without a machine: the agent as a process of this host, its host's ports as Unix sockets in a directory.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::{agent, agent_ttrpc::AgentClient};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::context::Context;

const INSTALLED_IMAGE: &str = "/usr/local/libexec/bulkhead/initramfs";
const CGROUP2_MAGIC: i64 = 0x6367_7270;
const APPLETS: [&str; 40] = [
    "sh", "true", "false", "echo", "cat", "sleep", "kill", "id", "ls", "stty", "tty", "head",
    "pwd", "readlink", "hostname", "env", "mount", "umount", "ps", "wc", "seq", "dd", "mkdir",
    "grep", "setsid", "touch", "rm", "tr", "stat", "uname", "nice", "ionice", "taskset", "sed",
    "awk", "date", "mkfifo", "chroot", "ip", "usleep",
];

/// How long a test waits for what must come. A quiet machine needs a second of it; one that is busy with other things several;
/// a hang all of it.
pub const PATIENCE: Duration = Duration::from_secs(120);

static NEXT_PORT: AtomicU32 = AtomicU32::new(2000);

/// An agent that runs, and the client of it.
pub struct Guest {
    process: Child,
    pub client: AgentClient,
    directory: TempDir,
    pub root: PathBuf,
    cgroups: String,
}

/// Deadline of each request in a test.
pub fn context() -> Context {
    ttrpc::context::with_duration(PATIENCE)
}

/// What must come, or the test's failure that says what it waited for.
pub async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done,
        Err(_) => panic!("waited {PATIENCE:?} in vain: {what}"),
    }
}

impl Guest {
    /// Starts an agent in mount and network namespaces of its own, with a cgroup2 hierarchy, and makes a busybox root for its containers.
    pub async fn start() -> Guest {
        let guest = Guest::before_sandbox().await;
        guest.start_sandbox().await.unwrap();
        guest
    }

    /// An agent that has not had its first request.
    pub async fn before_sandbox() -> Guest {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make namespaces and cgroups: run them as root"
        );
        assert!(
            Path::new("/bin/busybox").exists(),
            "these tests need Debian's busybox-static"
        );
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        busybox_root(&root);
        let listener = UnixListener::bind(directory.path().join("1024")).unwrap();
        let mut command = Command::new(program(directory.path()));
        command.arg("--host").arg(directory.path());
        let cgroup = directory.path().join("cgroup");
        std::fs::create_dir(&cgroup).unwrap();
        // SAFETY: only system calls between fork and exec.
        unsafe { command.pre_exec(move || Ok(private_system(&cgroup)?)) };
        let process = command.spawn().unwrap();
        let dialled = in_time("the agent dials its host", listener.accept()).await;
        let (stream, _) = dialled.unwrap();
        let client = AgentClient::new(ttrpc::r#async::Client::new(
            ttrpc::r#async::transport::Socket::new(stream),
        ));
        let cgroups = format!("bulkhead-agent-test-{}", process.id());
        Guest {
            process,
            client,
            directory,
            root,
            cgroups,
        }
    }

    /// Sends the first request.
    pub async fn start_sandbox(&self) -> ttrpc::Result<agent::StartSandboxResponse> {
        let request = agent::StartSandboxRequest {
            version: bulkhead_agent_protocol::PROTOCOL_VERSION,
            seed: vec![0; bulkhead_agent_protocol::SEED],
            sandbox_id: "test".into(),
            ..Default::default()
        };
        self.client.start_sandbox(context(), &request).await
    }

    /// Number of the agent's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A container that runs `script` in a shell, with namespaces, mounts and capabilities as `runc spec` has them.
    pub fn spec(&self, id: &str, script: &str) -> agent::Container {
        use agent::namespaces::Kind;
        agent::Container {
            root: self.root.to_str().unwrap().to_owned(),
            namespaces: Some(agent::Namespaces {
                pid: Kind::NEW.into(),
                mount: Kind::NEW.into(),
                uts: Kind::NEW.into(),
                ipc: Kind::NEW.into(),
                network: Kind::NEW.into(),
                cgroup: Kind::NEW.into(),
                ..Default::default()
            })
            .into(),
            mounts: mounts(),
            cgroup: format!("{}/{id}", self.cgroups),
            process: Some(shell(script)).into(),
            ..Default::default()
        }
    }

    /// Creates a container with all three streams (with a terminal: two).
    pub async fn create(&self, id: &str, spec: agent::Container) -> ttrpc::Result<Streams> {
        let (stdio, listeners) = self.stdio(spec.process.terminal);
        let request = agent::CreateContainerRequest {
            container_id: id.into(),
            spec: Some(spec).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client.create_container(context(), &request).await?;
        Ok(accept(listeners).await)
    }

    /// Adds a process to a container.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: agent::Process,
    ) -> ttrpc::Result<Streams> {
        let (stdio, listeners) = self.stdio(process.terminal);
        let request = agent::CreateExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client.create_exec(context(), &request).await?;
        Ok(accept(listeners).await)
    }

    /// A port of the host, and who listens on it.
    pub fn listen(&self) -> (u32, UnixListener) {
        let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path().join(port.to_string());
        (port, UnixListener::bind(path).unwrap())
    }

    fn stdio(&self, terminal: bool) -> (agent::Stdio, Vec<UnixListener>) {
        let count = if terminal { 2 } else { 3 };
        let first = NEXT_PORT.fetch_add(count, Ordering::Relaxed);
        let listeners = (0..count)
            .map(|n| {
                UnixListener::bind(self.directory.path().join((first + n).to_string())).unwrap()
            })
            .collect();
        let stderr_port = if terminal { 0 } else { first + 2 };
        (
            agent::Stdio {
                stdin_port: first,
                stdout_port: first + 1,
                stderr_port,
                ..Default::default()
            },
            listeners,
        )
    }

    pub async fn start_process(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        self.client
            .start_process(context(), &name(id, exec_id))
            .await
            .map(|response| {
                assert_eq!(
                    response.problem,
                    agent::ProgramProblem::NONE.into(),
                    "{}",
                    response.reason
                );
                response.pid
            })
    }

    /// Makes a container whose program is the problem: which, and in what words. Nothing of it is
    /// left.
    pub async fn create_badly(
        &self,
        id: &str,
        spec: agent::Container,
    ) -> (agent::ProgramProblem, String) {
        let (stdio, _listeners) = self.stdio(spec.process.terminal);
        let request = agent::CreateContainerRequest {
            container_id: id.into(),
            spec: Some(spec).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let created = self.client.create_container(context(), &request).await;
        let response = created.unwrap();
        (response.problem.enum_value().unwrap(), response.reason)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> agent::WaitProcessResponse {
        self.client
            .wait_process(context(), &name(id, exec_id))
            .await
            .unwrap()
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<agent::Empty> {
        self.client
            .delete_process(context(), &name(id, exec_id))
            .await
    }

    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> ttrpc::Result<agent::Empty> {
        let request = agent::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await
    }

    /// Creates, starts, feeds nothing, collects, waits and deletes.
    pub async fn run(&self, id: &str, spec: agent::Container) -> Output {
        let streams = self.create(id, spec).await.unwrap();
        self.start_process(id, "").await.unwrap();
        let (out, err) = streams.collect().await;
        let exit = self.wait(id, "").await;
        self.delete(id, "").await.unwrap();
        Output { out, err, exit }
    }

    /// The same for an exec process.
    pub async fn run_exec(&self, id: &str, exec_id: &str, process: agent::Process) -> Output {
        let streams = self.exec(id, exec_id, process).await.unwrap();
        self.start_process(id, exec_id).await.unwrap();
        let (out, err) = streams.collect().await;
        let exit = self.wait(id, exec_id).await;
        self.delete(id, exec_id).await.unwrap();
        Output { out, err, exit }
    }

    /// Starts a container that sleeps until it is killed.
    pub async fn sleeper(&self, id: &str, spec: agent::Container) -> Streams {
        let mut spec = spec;
        spec.process.as_mut().unwrap().args = ["/bin/sleep", "1000"].map(str::to_owned).to_vec();
        let streams = self.create(id, spec).await.unwrap();
        self.start_process(id, "").await.unwrap();
        streams
    }

    /// Kills and deletes a container.
    pub async fn end(&self, id: &str) {
        self.signal(id, "", libc::SIGKILL, true).await.unwrap();
        self.wait(id, "").await;
        self.delete(id, "").await.unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // What a failed test leaves, by the agent's own view of the hierarchy; the agent is the only one that has it.
        let cgroups = PathBuf::from(format!(
            "/proc/{}/root/sys/fs/cgroup/{}",
            self.pid(),
            self.cgroups
        ));
        let _ = std::fs::write(cgroups.join("cgroup.kill"), "1");
        // Killed processes leave their cgroups a moment later. What stays after that is in the way of no other test.
        let end = Instant::now() + Duration::from_secs(5);
        while cgroups.exists() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
            remove_cgroups(&cgroups);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn remove_cgroups(path: &Path) {
    for entry in std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir())
    {
        remove_cgroups(&entry.path());
    }
    let _ = std::fs::remove_dir(path);
}

/// The agent as cargo has built it, or, in the lab, as it is installed: /init of the guest's initramfs.
fn program(directory: &Path) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
    if built.exists() {
        return built.to_owned();
    }
    let image = std::fs::File::open(INSTALLED_IMAGE).expect("the agent is built or installed");
    let extracted = Command::new("/bin/busybox")
        .args(["cpio", "-i", "init"])
        .current_dir(directory)
        .stdin(image)
        .stderr(Stdio::null()) // it counts blocks there
        .status()
        .unwrap();
    assert!(extracted.success());
    directory.join("init")
}

/// A /sys that shows a network namespace of our own, whose hierarchy of cgroups is cgroup2; `aside` is an empty directory.
fn private_system(aside: &Path) -> nix::Result<()> {
    const CGROUP: &str = "/sys/fs/cgroup";
    let mount_at = |source: &str, target: &Path, flags| {
        mount(Some(source), target, Some(source), flags, None::<&str>)
    };
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
    mount_at("", Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    // The host's own mount where there is one: another one of it would change its options.
    let kind = nix::sys::statfs::statfs(CGROUP)?.filesystem_type();
    if kind.0 as i64 == CGROUP2_MAGIC {
        mount_at(CGROUP, aside, MsFlags::MS_BIND)?;
    } else {
        mount_at("cgroup2", aside, MsFlags::empty())?;
    }
    mount_at("sysfs", Path::new("/sys"), MsFlags::empty())?;
    mount(
        Some(aside),
        CGROUP,
        None::<&str>,
        MsFlags::MS_MOVE,
        None::<&str>,
    )
}

/// The host's ends of a process' streams.
pub struct Streams {
    pub stdin: UnixStream,
    pub stdout: UnixStream,
    pub stderr: Option<UnixStream>,
}

impl Streams {
    /// Ends stdin and reads the others to their end.
    pub async fn collect(self) -> (String, String) {
        let Streams {
            stdin,
            stdout,
            stderr,
        } = self;
        drop(stdin);
        let stderr = async {
            if let Some(stream) = stderr {
                read_all(stream).await
            } else {
                String::new()
            }
        };
        tokio::join!(read_all(stdout), stderr)
    }

    /// Reads stdout until it holds `text`; panics when it ends before.
    pub async fn expect(&mut self, text: &str) -> String {
        let mut seen = String::new();
        let mut buffer = [0u8; 4096];
        while !seen.contains(text) {
            let read = tokio::time::timeout(PATIENCE, self.stdout.read(&mut buffer)).await;
            let length = read
                .unwrap_or_else(|_| panic!("no \"{text}\" in {PATIENCE:?}, only: {seen}"))
                .unwrap();
            assert_ne!(length, 0, "the stream ended before \"{text}\": {seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        seen
    }

    pub async fn type_in(&mut self, text: &str) {
        let written = in_time("a key is taken", self.stdin.write_all(text.as_bytes())).await;
        written.unwrap();
    }
}

async fn read_all(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    let read = in_time("a stream ends", stream.read_to_end(&mut bytes)).await;
    read.unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The streams of a process that the agent has made: it has dialled all of them by then, so that they wait here.
async fn accept(listeners: Vec<UnixListener>) -> Streams {
    let mut streams = Vec::new();
    for listener in listeners {
        let accepted = in_time("the agent dials a stream", listener.accept()).await;
        streams.push(accepted.unwrap().0);
    }
    let mut streams = streams.into_iter();
    let mut next = || streams.next().expect("two of each process");
    Streams {
        stdin: next(),
        stdout: next(),
        stderr: streams.next(),
    }
}

/// What a process left.
#[derive(Debug)]
pub struct Output {
    pub out: String,
    pub err: String,
    pub exit: agent::WaitProcessResponse,
}

impl Output {
    /// Standard output without its last newline, of a process that succeeded.
    pub fn text(&self) -> &str {
        assert_eq!(self.exit.exit_status, 0, "{self:?}");
        self.out.trim_end()
    }
}

/// A process that runs `script` in a shell as root without capabilities.
pub fn shell(script: &str) -> agent::Process {
    agent::Process {
        args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin".to_owned()],
        cwd: "/".to_owned(),
        umask: -1,
        ..Default::default()
    }
}

fn name(id: &str, exec_id: &str) -> agent::ProcessRequest {
    agent::ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

/// The code and text of an error.
pub fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other}"),
    }
}

/// Lines "Key:\tvalue" of /proc/self/status.
pub fn fields(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| {
            (
                key.to_owned(),
                value.split_whitespace().collect::<Vec<_>>().join(" "),
            )
        })
        .collect()
}

fn mounts() -> Vec<agent::Mount> {
    let nothing = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let mount = |destination: &str, fstype: &str, flags: u64, data: &str| agent::Mount {
        destination: destination.into(),
        fstype: fstype.into(),
        source: fstype.into(),
        flags,
        data: data.into(),
        ..Default::default()
    };
    vec![
        mount("/proc", "proc", nothing, ""),
        mount(
            "/dev",
            "tmpfs",
            libc::MS_NOSUID | libc::MS_STRICTATIME,
            "mode=755,size=65536k",
        ),
        mount(
            "/dev/pts",
            "devpts",
            libc::MS_NOSUID | libc::MS_NOEXEC,
            "newinstance,ptmxmode=0666,mode=0620,gid=5",
        ),
        mount("/dev/shm", "tmpfs", nothing, "mode=1777,size=65536k"),
        mount("/sys", "sysfs", nothing | libc::MS_RDONLY, ""),
    ]
}

fn busybox_root(root: &Path) {
    for directory in ["bin", "proc", "dev", "sys", "tmp", "etc", "root"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    // A container with a user namespace must be able to walk to it.
    use std::os::unix::fs::PermissionsExt;
    for path in [root, root.parent().unwrap()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}
