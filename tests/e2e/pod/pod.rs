//! A live pod, and containers that do what a test tells them.

use std::fs;
use std::future::Future;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::Poll;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_agent_protocol::agent::{self as wire, WaitProcessResponse, namespaces::Kind};
use bulkhead_shim::config::Config;
use bulkhead_shim::ledger::Resource;
use bulkhead_shim::oci::{self, Plan};
use bulkhead_shim::pod::{self, Parts, Request, Sandbox, Size};
use bulkhead_tests::{Bundle, Host, PATIENCE, fresh_id};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

/// Where `tests/run` installs the parts.
const LIBEXEC: &str = "/usr/local/libexec/bulkhead";
/// How long a container may take to answer: emulation is slow, and a hang must not last for ever.
const ANSWER: Duration = PATIENCE;

/// Executes each line of its input, a JSON string of Python, and answers with the JSON of the variable `answer`.
pub const DRIVER: &str = r"
import json, sys
scope = {}
for line in sys.stdin:
    scope['answer'] = None
    try:
        exec(json.loads(line), scope)
    except Exception as error:
        at = error.__traceback__
        while at.tb_next:
            at = at.tb_next
        scope['answer'] = f'{type(error).__name__} in line {at.tb_lineno}: {error}'
    print(json.dumps(scope['answer']), flush=True)
";

/// A running pod on a host that must look as before when it has gone.
pub struct Pod {
    id: String,
    bundles: Vec<Bundle>,
    runtime: Runtime,
    sandbox: Sandbox,
    host: Host,
}

impl Pod {
    /// Boots one.
    pub fn start(memory_mib: u64) -> Pod {
        let host = Host::now();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let config = Config {
            libexec_dir: Some(PathBuf::from(LIBEXEC)),
            ..Config::default()
        };
        let id = fresh_id();
        let sandbox = runtime.block_on(async {
            let parts = Parts::open(&config).expect("an installed Bulkhead");
            let size = Size {
                vcpus: 2,
                memory_mib,
            };
            let request = Request::plain("pods", &id, size);
            let launched = Sandbox::launch(&config, &parts, request).await;
            let mut sandbox = launched.expect("a pod");
            sandbox.ready("pod").await.expect("a guest that is ready");
            sandbox
        });
        Pod {
            id,
            bundles: Vec::new(),
            runtime,
            sandbox,
            host,
        }
    }

    /// Runs something of the library to its end, which must come.
    #[track_caller]
    pub fn block_on<T>(&mut self, work: impl AsyncFnOnce(&mut Sandbox) -> T) -> T {
        let bounded = async { tokio::time::timeout(ANSWER, work(&mut self.sandbox)).await };
        match self.runtime.block_on(bounded) {
            Ok(result) => result,
            Err(_) => panic!("not finished within {ANSWER:?}"),
        }
    }

    /// Runs something beside the library, which goes on meanwhile: this front end has only the caller's thread.
    pub fn meanwhile<T: Send>(&mut self, work: impl FnOnce() -> T + Send) -> T {
        let (sender, done) = tokio::sync::oneshot::channel::<()>();
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Dropped when the work is done, or has panicked.
                let _sender = sender;
                work()
            });
            let _ = self.runtime.block_on(done);
            thread.join().expect("no panic")
        })
    }

    /// What the bundle asks for, as the library understands it.
    pub fn plan(bundle: &Bundle, id: &str) -> Plan {
        bundle.write();
        let bundle = oci::Bundle::load(bundle.path()).expect("a bundle");
        oci::plan(&bundle, id).expect("a plan")
    }

    /// Places, makes and starts a container whose output is read.
    pub fn run(&mut self, id: &str, plan: &Plan) -> Output {
        self.block_on(async |sandbox| {
            sandbox
                .place_container(id, plan)
                .await
                .unwrap_or_else(|e| panic!("{id}: {e}"));
            let output = create(sandbox, id, plan).await;
            sandbox.agent().start(id).await.expect("it starts");
            output
        })
    }

    /// A container that does as it is told, with `bundle`'s files.
    pub fn driven(&mut self, id: &str, bundle: Bundle) -> Driven {
        let bundle = bundle.args(&["/usr/bin/python3", "-I", "-S", "-c", DRIVER]);
        let plan = Pod::plan(&bundle, id);
        self.driven_by(id, bundle, &plan)
    }

    /// The same, in the guest's own pid namespace: it sees the processes of all containers.
    pub fn observer(&mut self, id: &str, bundle: Bundle) -> Driven {
        let bundle = bundle
            .args(&["/usr/bin/python3", "-I", "-S", "-c", DRIVER])
            .edit(|config| {
                for set in ["bounding", "effective", "permitted"] {
                    config["process"]["capabilities"][set] =
                        json!(["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
                }
                config["linux"]["readonlyPaths"] = json!([]);
            });
        let mut plan = Pod::plan(&bundle, id);
        plan.container.namespaces.mut_or_insert_default().pid = Kind::AGENT.into();
        self.driven_by(id, bundle, &plan)
    }

    fn driven_by(&mut self, id: &str, bundle: Bundle, plan: &Plan) -> Driven {
        let (stdin, stdout) = self.block_on(async |sandbox| {
            sandbox
                .place_container(id, plan)
                .await
                .unwrap_or_else(|e| panic!("{id}: {e}"));
            let (stdin_port, stdin) = sandbox.stream().await.expect("a stream");
            let (stdout_port, stdout) = sandbox.stream().await.expect("a stream");
            let (stderr_port, stderr) = sandbox.stream().await.expect("a stream");
            let stdio = wire::Stdio {
                stdin_port,
                stdout_port,
                stderr_port,
                ..wire::Stdio::default()
            };
            let made = sandbox.create_container(id, plan.container.clone(), stdio);
            made.await.unwrap_or_else(|e| panic!("{id}: {e}"));
            sandbox.agent().start(id).await.expect("it starts");
            let name = id.to_owned();
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    eprintln!("{name}: {line}");
                }
            });
            (stdin, stdout)
        });
        stdout.set_read_timeout(Some(ANSWER)).expect("a time");
        stdin.set_write_timeout(Some(ANSWER)).expect("a time");
        self.bundles.push(bundle);
        Driven {
            id: id.to_owned(),
            stdin,
            stdout: BufReader::new(stdout),
        }
    }

    /// Waits for the end of a container.
    pub fn wait(&mut self, id: &str) -> WaitProcessResponse {
        self.block_on(async |sandbox| sandbox.agent().wait(id).await.expect("an exit"))
    }

    /// Kills a container and waits for its end.
    pub fn kill(&mut self, id: &str) {
        let exit = self.block_on(async |sandbox| {
            let signalled = sandbox.agent().signal(id, Signal::SIGKILL as i32).await;
            signalled.expect("it runs");
            sandbox.agent().wait(id).await.expect("an exit")
        });
        assert_eq!((exit.exit_status, exit.signal), (137, 9), "{id}");
    }

    /// Takes a container out of the pod.
    pub fn remove(&mut self, id: &str) -> Result<(), pod::Error> {
        self.block_on(async |sandbox| sandbox.remove_container(id).await)
    }

    /// Pid of the fs process.
    pub fn fs_pid(&self) -> i32 {
        let mut held = self.sandbox.held();
        let found = held.find_map(|resource| match resource {
            Resource::Process { id, role } if role == "bulkhead-vmm fs" => Some(id.pid),
            _ => None,
        });
        found.expect("an fs process")
    }

    /// How many mounts the share has, as the host and as the fs process see it.
    pub fn shared_mounts(&self) -> (usize, usize) {
        let count = |pid: &str, holds: &dyn Fn(&str) -> bool| {
            let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts");
            let points = text.lines().filter_map(|line| line.split(' ').nth(4));
            points.filter(|point| holds(point)).count()
        };
        let share = format!("/run/bulkhead/pods/{}/pod/share/", self.id);
        let on_host = |point: &str| point.starts_with(&share);
        let in_jail = |point: &str| point.starts_with("/share/");
        (
            count("self", &on_host),
            count(&self.fs_pid().to_string(), &in_jail),
        )
    }

    /// Bytes of the ledger.
    pub fn ledger_size(&self) -> u64 {
        let path = format!("/run/bulkhead/pods/{}/ledger", self.id);
        fs::metadata(path).expect("a ledger").len()
    }

    /// Powers the guest off, gives everything back, and looks whether that is so.
    pub fn end(self) {
        let Pod {
            runtime,
            sandbox,
            host,
            bundles,
            ..
        } = self;
        let off = async { tokio::time::timeout(ANSWER, sandbox.power_off()).await };
        let off = runtime.block_on(off);
        off.unwrap_or_else(|_| panic!("waited {ANSWER:?} in vain for the guest's end"));
        let left = sandbox.give_back();
        assert!(left.is_empty(), "{left:?}");
        drop((runtime, bundles));
        host.assert_nothing_left();
    }
}

/// Makes a placed container with its output on a stream.
pub async fn create(sandbox: &mut Sandbox, id: &str, plan: &Plan) -> Output {
    let (stdout_port, stdout) = sandbox.stream().await.expect("a stream");
    let stdio = wire::Stdio {
        stdout_port,
        ..wire::Stdio::default()
    };
    let made = sandbox.create_container(id, plan.container.clone(), stdio);
    made.await.unwrap_or_else(|e| panic!("{id}: {e}"));
    Output::read(stdout)
}

/// A container's output, read by a thread.
pub struct Output(JoinHandle<String>);

impl Output {
    /// Reads until the container's last writer is gone.
    pub fn read(mut stream: UnixStream) -> Output {
        stream.set_read_timeout(Some(ANSWER)).expect("a time");
        Output(thread::spawn(move || {
            let mut text = String::new();
            stream
                .read_to_string(&mut text)
                .expect("a stream that ends");
            text
        }))
    }

    /// All of it.
    pub fn text(self) -> String {
        self.0.join().expect("a reader")
    }
}

/// A container that does as it is told.
pub struct Driven {
    /// Its id.
    pub id: String,
    stdin: UnixStream,
    stdout: BufReader<UnixStream>,
}

impl Driven {
    /// Has it begin with some Python.
    pub fn tell(&mut self, python: &str) {
        let line = format!("{}\n", json!(python));
        self.stdin.write_all(line.as_bytes()).expect("it listens");
    }

    /// The answer to what it was told.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line);
        read.unwrap_or_else(|error| panic!("{} does not answer: {error}", self.id));
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{} said {line:?}", self.id))
    }

    /// Both.
    #[track_caller]
    pub fn ask(&mut self, python: &str) -> Value {
        self.tell(python);
        self.answer()
    }
}

/// Runs all at once and gives their results in order.
pub async fn all<T>(work: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut work: Vec<Pin<Box<_>>> = work.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<T>> = work.iter().map(|_| None).collect();
    std::future::poll_fn(move |context| {
        for (future, slot) in work.iter_mut().zip(&mut done) {
            if slot.is_none()
                && let Poll::Ready(result) = future.as_mut().poll(context)
            {
                *slot = Some(result);
            }
        }
        match done.iter().all(Option::is_some) {
            true => Poll::Ready(done.iter_mut().filter_map(Option::take).collect()),
            false => Poll::Pending,
        }
    })
    .await
}
