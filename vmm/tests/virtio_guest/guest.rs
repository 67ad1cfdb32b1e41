//! The guest's side: PID 1 of a machine with nothing but this program.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_vmm_config::{ANNOUNCE_PORT, announce};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use super::pattern;
use super::plan;

type Scenario = fn() -> Result<String, String>;

pub const SCENARIOS: [(&str, Scenario); 17] = [
    ("a slow host", slow),
    ("a port that is not offered", refused),
    ("an echo of bulk data", || echo(plan::ECHO, plan::BULK)),
    ("a sink", sink),
    ("a source", source),
    ("a host that is gone", gone),
    ("a host that does not read", deaf),
    ("round trips", ping),
    ("many at once", many),
    ("a port that was used", || refuse(plan::ECHO)),
    ("random bytes", random),
    ("memory that is plugged", plugged),
    ("a shared directory", files),
    ("the end of the slow host", slow_end),
    ("the driver bound again", bind_again),
    ("random bytes again", random),
    ("a shared directory again", files),
];

/// Runs all scenarios and powers off.
pub fn run() -> ! {
    // SAFETY: plain numbers; the port is the VMM's and touches nothing else.
    let allowed = unsafe { libc::ioperm(ANNOUNCE_PORT.into(), 1, 1) };
    assert_eq!(allowed, 0);
    say(announce::INIT);
    for (source, target, kind) in [
        ("dev", "/dev", "devtmpfs"),
        ("sys", "/sys", "sysfs"),
        ("proc", "/proc", "proc"),
    ] {
        let _ = fs::create_dir(target);
        let mounted = mount(
            Some(source),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        );
        if let Err(error) = mounted {
            println!("mounting {target} FAILED {error}");
        }
    }
    let mut host = dial(plan::START).expect("the host is there");
    // Perhaps in another machine than the one that has begun to wait.
    host.read_exact(&mut [0]).expect("the host says when");
    let mut report = String::new();
    for (name, scenario) in SCENARIOS {
        let start = Instant::now();
        let outcome = match std::panic::catch_unwind(scenario) {
            Ok(Ok(note)) => format!("ok, {:?} {note}", start.elapsed()),
            Ok(Err(why)) => format!("FAILED {why}"),
            Err(_) => "FAILED by a panic".to_owned(),
        };
        println!("{name} {outcome}");
        report += &format!("{name} {outcome}\n");
    }
    // The first connection has gone with the driver that was bound again.
    let mut host = dial(plan::REPORT).expect("the host listens to the report");
    host.write_all(report.as_bytes()).expect("the host reads");
    drop(host);
    // The machine stops at the announcement, whatever the console still holds.
    let _ = nix::sys::termios::tcdrain(io::stdout());
    say(announce::POWER_OFF);
    loop {
        std::thread::park();
    }
}

fn say(byte: u8) {
    // SAFETY: `run` has asked for the port; the instruction changes no memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") ANNOUNCE_PORT, in("al") byte, options(nomem, nostack));
    }
}

/// A connection, as the type that has read, write and shutdown; Linux does not mind the family.
fn dial(port: u32) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &VsockAddr::new(2, port))?;
    Ok(UnixStream::from(fd))
}

fn refuse(port: u32) -> Result<String, String> {
    let start = Instant::now();
    match dial(port) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => return Err(format!("{other:?}")),
    }
    // Linux itself gives up after 2 s (VSOCK_DEFAULT_CONNECT_TIMEOUT), with another error.
    if start.elapsed() > Duration::from_secs(2) {
        return Err(format!("took {:?}", start.elapsed()));
    }
    Ok(String::new())
}

fn refused() -> Result<String, String> {
    refuse(plan::CLOSED)
}

/// Sends back what comes, while it comes; then ends, and finds the host's end.
fn echo(port: u32, count: usize) -> Result<String, String> {
    let told = |error: io::Error| error.to_string();
    let start = Instant::now();
    let mut socket = dial(port).map_err(told)?;
    let mut total = 0;
    let mut block = vec![0; 128 << 10];
    loop {
        let read = socket.read(&mut block).map_err(told)?;
        if read == 0 {
            break;
        }
        socket.write_all(&block[..read]).map_err(told)?;
        total += read;
    }
    socket.shutdown(Shutdown::Write).map_err(told)?;
    if total != count {
        return Err(format!("{total} bytes"));
    }
    let rate = total as f64 / start.elapsed().as_secs_f64() / 1e6;
    Ok(format!("{rate:.0} MB/s each way"))
}

fn sink() -> Result<String, String> {
    let mut socket = dial(plan::SINK).map_err(|error| error.to_string())?;
    let bytes = pattern(plan::SINK, plan::BULK);
    socket
        .write_all(&bytes)
        .map_err(|error| error.to_string())?;
    Ok(String::new())
}

fn source() -> Result<String, String> {
    let mut socket = dial(plan::SOURCE).map_err(|error| error.to_string())?;
    // Slowly first, so that the host has closed long before the guest has read.
    let mut bytes = vec![0; 1];
    socket
        .read_exact(&mut bytes)
        .map_err(|error| error.to_string())?;
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    let read = socket.read_to_end(&mut bytes);
    read.map_err(|error| format!("{error} after {} bytes", bytes.len()))?;
    let rate = plan::BULK as f64 / start.elapsed().as_secs_f64() / 1e6;
    if bytes != pattern(plan::SOURCE, plan::BULK) {
        return Err(format!("other bytes, {} of them", bytes.len()));
    }
    Ok(format!("{rate:.0} MB/s"))
}

/// The end comes at once, and a write finds nobody: never a wait.
fn gone() -> Result<String, String> {
    let start = Instant::now();
    let mut socket = dial(plan::GONE).map_err(|error| error.to_string())?;
    match socket.read(&mut [0; 8]) {
        Ok(0) => {}
        other => return Err(format!("read {other:?}")),
    }
    while socket.write_all(b"anybody?").is_ok() {
        if start.elapsed() > Duration::from_secs(60) {
            return Err("writes go on".into());
        }
    }
    Ok(format!("{:?} to the broken pipe", start.elapsed()))
}

/// Writes until the host closes with everything unread.
fn deaf() -> Result<String, String> {
    let mut socket = dial(plan::DEAF).map_err(|error| error.to_string())?;
    let start = Instant::now();
    let mut written = 0;
    while socket.write_all(&[7; 4096]).is_ok() {
        written += 4096;
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("{written} bytes and no end"));
        }
    }
    Ok(format!("{written} bytes"))
}

/// Closes with bytes in flight: the close does not wait, and the host gets them although the guest forgets the connection.
fn slow() -> Result<String, String> {
    let mut socket = dial(plan::SLOW).map_err(|error| error.to_string())?;
    let bytes = pattern(plan::SLOW, plan::SMALL);
    socket
        .write_all(&bytes)
        .map_err(|error| error.to_string())?;
    Ok(String::new())
}

/// The host begins to read after 10 s: before that the machine must not end, nor the device be reset.
fn slow_end() -> Result<String, String> {
    let mut up = String::new();
    let read = File::open("/proc/uptime").and_then(|mut file| file.read_to_string(&mut up));
    read.map_err(|error| error.to_string())?;
    let up: f64 = up
        .split(' ')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .ok_or(up)?;
    std::thread::sleep(Duration::from_secs_f64((plan::SLOW_SECONDS - up).max(0.0)));
    Ok(String::new())
}

fn ping() -> Result<String, String> {
    let mut socket = dial(plan::PING).map_err(|error| error.to_string())?;
    let start = Instant::now();
    for nth in 0..plan::PINGS {
        let sent = [nth as u8; 64];
        let mut received = [0; 64];
        socket.write_all(&sent).map_err(|error| error.to_string())?;
        socket
            .read_exact(&mut received)
            .map_err(|error| error.to_string())?;
        if sent != received {
            return Err(format!("other bytes in message {nth}"));
        }
    }
    Ok(format!("{:?} each", start.elapsed() / plan::PINGS as u32))
}

fn many() -> Result<String, String> {
    let sides: Vec<_> = (0..plan::MANY)
        .map(|nth| std::thread::spawn(move || echo(plan::FIRST_OF_MANY + nth, plan::SMALL)))
        .collect();
    for side in sides {
        side.join().map_err(|_| "a panic")??;
    }
    Ok(String::new())
}

/// Linux asks for 64 bytes at a time: this is a hundred requests.
fn random() -> Result<String, String> {
    let mut source = File::open("/dev/hwrng").map_err(|error| error.to_string())?;
    let mut bytes = vec![0; 6400];
    source
        .read_exact(&mut bytes)
        .map_err(|error| error.to_string())?;
    let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    // 25,600 on average, with a deviation of 113.
    ones.abs_diff(25_600)
        .lt(&1200)
        .then(String::new)
        .ok_or(format!("{ones} bits of 51200 are set"))
}

/// Until the kernel has what the host asked it to have.
fn plugged() -> Result<String, String> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let text = fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
        let total = number(&text, "MemTotal:")? >> 10;
        // Less what the kernel has of what was there from the start.
        if total > plan::PLUGGED + plan::MEMORY * 3 / 4 {
            return Ok(format!("{total} MiB"));
        }
        if Instant::now() > end {
            return Err(format!("{total} MiB"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Pages of files that were read into memory that was plugged, by the fs process.
fn cached() -> Result<u64, String> {
    let text = fs::read_to_string("/proc/zoneinfo").map_err(|error| error.to_string())?;
    let zones = text.split("Node ");
    let movable = zones
        .into_iter()
        .find(|zone| zone.starts_with("0, zone  Movable"))
        .ok_or("nothing is movable")?;
    let pages = number(movable, "nr_zone_inactive_file")? + number(movable, "nr_zone_active_file")?;
    match pages as usize * 4096 > plan::FILE / 2 {
        true => Ok(pages),
        false => Err(format!("{pages} pages of files are in plugged memory")),
    }
}

/// What stands behind a name.
fn number(text: &str, name: &str) -> Result<u64, String> {
    let mut words = text.split_whitespace().skip_while(|word| *word != name);
    let word = words.nth(1).ok_or(format!("no {name}"))?;
    word.parse().map_err(|_| format!("{name} {word}"))
}

/// Reads what the host wrote, writes a file and reads it back from the host.
fn files() -> Result<String, String> {
    let none = None::<&str>;
    let told = |error: nix::Error| error.to_string();
    let _ = fs::create_dir("/mnt");
    mount(
        Some(plan::TAG),
        "/mnt",
        Some("virtiofs"),
        MsFlags::empty(),
        none,
    )
    .map_err(told)?;
    let result = read_and_write().map_err(|error| error.to_string());
    nix::mount::umount("/mnt").map_err(told)?;
    result
}

fn read_and_write() -> io::Result<String> {
    let start = Instant::now();
    let same = fs::read("/mnt/from-host")? == pattern(1, plan::FILE);
    let mut file = File::create("/mnt/from-guest")?;
    file.write_all(&pattern(2, plan::FILE))?;
    file.sync_all()?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let same = same && fs::read("/mnt/from-guest")? == pattern(2, plan::FILE);
    let names = fs::read_dir("/mnt")?.count();
    if !same || names != 2 {
        return Err(io::Error::other(format!(
            "same bytes: {same}, {names} names"
        )));
    }
    let rate = 3.0 * plan::FILE as f64 / start.elapsed().as_secs_f64() / 1e6;
    let plugged = cached().map_err(io::Error::other)?;
    Ok(format!("{rate:.0} MB/s, {plugged} pages in plugged memory"))
}

/// Unbinds and binds all drivers, which resets the devices and sets them up anew.
fn bind_again() -> Result<String, String> {
    for driver in ["vmw_vsock_virtio_transport", "virtio_rng", "virtiofs"] {
        let folder = format!("/sys/bus/virtio/drivers/{driver}");
        let device = fs::read_dir(&folder)
            .map_err(|error| format!("{folder}: {error}"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.starts_with("virtio"))
            .ok_or(format!("{driver} has no device"))?;
        for step in ["unbind", "bind"] {
            fs::write(format!("{folder}/{step}"), &device)
                .map_err(|error| format!("{step} {driver}: {error}"))?;
        }
    }
    echo(plan::AGAIN, plan::SMALL)
}
