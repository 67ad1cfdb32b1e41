//! Containers of a pod share its guest's AF_VSOCK: none of them gets a stream of another one's.

use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use bulkhead_tests::{BULKHEAD, Engine, Started, fresh_id};

use super::Pod;
use crate::eventually;

/// Python of the Debian root, which a busybox image can be given as a volume.
const PYTHON: &str = "chroot /share /usr/bin/python3 -c";
const VOLUME: [&str; 2] = [
    "--mount",
    "type=bind,src=/share,dst=/share,options=rbind:ro",
];

/// Dials each port after the ones that the guest has used, and some at random, and keeps what it gets. It says when it has begun.
const DIAL: &str = r#"
import random, socket, sys, time
began, tries = time.time(), 0
while time.time() - began < 3600:
    near = [1026 + tries % 200 + n for n in range(20)]
    for port in near + [random.randrange(1026, 2**32 - 1) for _ in range(20)]:
        try:
            with socket.socket(40, socket.SOCK_STREAM) as stream:
                stream.settimeout(5)
                stream.connect((2, port))
                print("took", port, stream.recv(100), flush=True)
        except OSError:
            pass
    tries += 1
    if tries == 1: print("dialling", flush=True)
"#;

#[test]
fn a_dial_loop_takes_no_stream_of_another_container() {
    let pod = Pod::start(BULKHEAD, &[]);
    let victim = pod.member(&["ipc", "uts", "network"], "exec sleep 100000");
    let id = fresh_id();
    let script = format!("{PYTHON} '{DIAL}'");
    let words = pod.words(&VOLUME, &["ipc", "uts", "network"], &id, &script);
    let attack = Started::spawn(Engine::get().ctr(&words));
    attack.wait_for_output("dialling\n");
    for n in 0..6 {
        let secret = format!("TOPSECRET-{n}");
        let exec_id = fresh_id();
        let words = ["task", "exec", "--exec-id", &exec_id, &victim.id, "cat"];
        let mut exec = Started::spawn(Engine::get().ctr(&words));
        let mut stdin = exec.stdin();
        stdin.write_all(secret.as_bytes()).expect("ctr reads");
        // As a user who types: the end comes after the beginning has been passed on.
        thread::sleep(Duration::from_millis(200));
        drop(stdin);
        let ran = exec.finish();
        assert_eq!((ran.status, ran.text()), (0, secret), "{ran}");
    }
    assert_eq!(attack.output(), "dialling\n");
    let attacker = crate::Running { id };
    let _ = Engine::get().run(&["task", "kill", "--signal", "SIGKILL", &attacker.id]);
    attack.finish();
    eventually("it stops", || {
        attacker.status().is_none_or(|status| status == "STOPPED")
    });
    attacker.remove();
    victim.remove();
    pod.remove();
}

/// What making a vsock socket answers: by socket, by socketpair, and by 32-bit socketcall, whose arguments no filter sees.
const PROBE: &str = r#"
import ctypes, errno, mmap, socket, struct
def name(number): return errno.errorcode.get(number, str(number))
def tried(make):
    try:
        make()
        return "made"
    except OSError as error: return name(error.errno)
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    print(tried(lambda: socket.socket(40, kind)))
print(tried(lambda: socket.socketpair(40, socket.SOCK_STREAM)))
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
PROT, FLAGS = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40
low = libc.mmap(None, 4096, PROT, FLAGS, -1, 0)
def int80(number, first, second, third=0):
    code = b"\x53\xb8" + struct.pack("<I", number) + b"\xbb" + struct.pack("<I", first) + b"\xb9" + struct.pack("<I", second)
    code += b"\xba" + struct.pack("<I", third) + b"\xcd\x80\x5b\xc3"
    ctypes.memmove(low, code, len(code))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(low)()
    return name(-result) if result < 0 else "made"
ctypes.memmove(low + 1024, struct.pack("<III", 40, 1, 0), 12)
print(int80(102, 1, low + 1024))
print(int80(359, 40, 1))
# The way itself works.
ctypes.memmove(low + 1024, struct.pack("<III", 2, 1, 0), 12)
print(int80(102, 1, low + 1024))
"#;

#[test]
fn no_container_makes_a_vsock_socket() {
    assert!(
        Path::new("/share/usr/bin/python3").exists(),
        "run by tests/run"
    );
    let pod = Pod::start(BULKHEAD, &[]);
    let plain = format!("{PYTHON} '{PROBE}'");
    let in_user_namespace = format!("unshare -U -r {plain}");
    let powers = ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_NET_ADMIN"];
    for (words, script) in [
        (&[][..], &plain),
        (&powers, &plain),
        (&powers, &in_user_namespace),
        (&["--seccomp"], &plain),
    ] {
        let ran = pod.run(&[&VOLUME[..], words].concat(), script);
        let text = ran.text();
        let answers: Vec<&str> = text.lines().collect();
        assert_eq!((answers.len(), answers.last()), (7, Some(&"made")), "{ran}");
        // containerd's own profile is asked first where it looks at the family.
        let refusals: &[&str] = match words {
            ["--seccomp"] => &["EAFNOSUPPORT", "EPERM"],
            _ => &["EAFNOSUPPORT"],
        };
        for answer in &answers[..6] {
            assert!(refusals.contains(answer), "{words:?}: {ran}");
        }
    }
    pod.remove();
}
