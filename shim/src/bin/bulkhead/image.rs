//! `bulkhead run IMAGE` and `bulkhead image`: containers from images, without a bundle.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::PathBuf,
};

use bulkhead_images::{Image, Scratch, Store, User};
use bulkhead_shim::{config::Config, oci::Bundle, pod::layers::Layer};
use oci_spec::{
    image::Config as Wishes,
    runtime::{
        Capability, LinuxCapabilitiesBuilder, LinuxNamespaceType, Mount, MountBuilder,
        ProcessBuilder, RootBuilder, Spec, UserBuilder,
    },
};

use crate::failure::Failure;

/// Where programs are looked for if the image does not say: as engines have it.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What engines give a container that nobody has asked for more: as Docker and containerd.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// What a user may say about a container from an image.
#[derive(clap::Args)]
#[command(next_help_heading = "With an image")]
pub struct Wanted {
    /// Name of the container and its pod, unique on this host; default: image-PID
    #[arg(long, value_name = "ID")]
    name: Option<String>,
    /// Set a variable; KEY alone takes it from this command's own environment
    #[arg(short, long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User, and group if wanted: names of the image, or numbers
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Mount a directory or a file of this host; `:ro` makes it read-only
    #[arg(short, long, value_name = "SOURCE:PLACE[:ro]")]
    volume: Vec<String>,
    /// Program in the place of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Refuse writes to the root file system
    #[arg(long)]
    read_only: bool,
    /// Network namespace whose interfaces the machine gets; default: none but loopback
    #[arg(long, value_name = "PATH")]
    network: Option<PathBuf>,
}

impl Wanted {
    /// The first of these options that was given: they mean nothing without an image.
    pub fn given(&self) -> Option<&'static str> {
        [
            ("--name", self.name.is_some()),
            ("--env", !self.env.is_empty()),
            ("--workdir", self.workdir.is_some()),
            ("--user", self.user.is_some()),
            ("--volume", !self.volume.is_empty()),
            ("--entrypoint", self.entrypoint.is_some()),
            ("--read-only", self.read_only),
            ("--network", self.network.is_some()),
        ]
        .into_iter()
        .find_map(|(name, given)| given.then_some(name))
    }

    /// The name of the container.
    pub fn id(&self) -> String {
        let by_pid = || format!("image-{}", std::process::id());
        self.name.clone().unwrap_or_else(by_pid)
    }
}

/// A container from an image: what it takes of the host goes with it.
pub struct Prepared {
    /// Its root file system.
    pub layers: Vec<Layer>,
    scratch: Scratch,
    _image: Image,
}

impl Prepared {
    /// Removes what the container has written, when it has ended.
    pub fn remove(self) {
        if let Err(error) = self.scratch.remove() {
            tracing::warn!(
                "{}; `bulkhead gc` tries again",
                crate::failure::line(&error)
            );
        }
    }
}

/// Unpacks the image, if it is not yet, and writes down what the container is.
pub fn prepare(
    word: &str,
    wanted: &Wanted,
    command: &[String],
    terminal: bool,
    config: &Config,
) -> Result<(Bundle, Prepared), Failure> {
    let store = Store::at(&config.data_dir);
    let told = |what: &str| eprintln!("bulkhead: {what}");
    let image = store.image(word, &told)?;
    let wishes = image.config.config().clone().unwrap_or_default();
    let user = wanted.user.clone().or(wishes.user().clone());
    let user = image.user(&user.unwrap_or_default())?;
    let id = wanted.id();
    let scratch = store.scratch(&id, &image)?;
    let mut spec = Spec::default();
    // Linux has 64 characters for it, fewer than a container's name may have.
    let hostname: String = id.chars().take(63).collect();
    spec.set_hostname(Some(hostname));
    let args = arguments(&wishes, wanted, command)?;
    spec.set_process(Some(process(
        args,
        (&wishes, wanted),
        &user,
        terminal,
        &id,
    )?));
    let root = RootBuilder::default().path(&image.root);
    spec.set_root(Some(root.readonly(wanted.read_only).build()?));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.extend(files(&scratch, &id, wanted)?);
    for volume in &wanted.volume {
        mounts.push(bind(volume)?);
    }
    spec.set_mounts(Some(mounts));
    if let Some(path) = &wanted.network {
        enter(&mut spec, path.clone());
    }
    let layer = Layer {
        kind: "overlay".into(),
        source: "overlay".into(),
        options: scratch.overlay(&image),
    };
    let bundle = Bundle {
        directory: "/".into(),
        spec,
    };
    let prepared = Prepared {
        layers: vec![layer],
        scratch,
        _image: image,
    };
    Ok((bundle, prepared))
}

/// The words of the program (OCI image config.md#properties: Entrypoint, Cmd).
fn arguments(wishes: &Wishes, wanted: &Wanted, command: &[String]) -> Result<Vec<String>, Failure> {
    let (mut words, rest) = match &wanted.entrypoint {
        Some(program) => {
            let words = Some(program.clone()).filter(|program| !program.is_empty());
            (words.into_iter().collect(), Vec::new())
        }
        None => (
            wishes.entrypoint().clone().unwrap_or_default(),
            wishes.cmd().clone().unwrap_or_default(),
        ),
    };
    match command.is_empty() {
        true => words.extend(rest),
        false => words.extend_from_slice(command),
    }
    match words.is_empty() {
        false => Ok(words),
        true => Err(Failure::new(
            "the image names no program: put a command after the image",
        )),
    }
}

fn process(
    args: Vec<String>,
    (wishes, wanted): (&Wishes, &Wanted),
    user: &User,
    terminal: bool,
    id: &str,
) -> Result<oci_spec::runtime::Process, Failure> {
    let mut env = vec![
        PATH.into(),
        format!("HOSTNAME={id}"),
        format!("HOME={}", user.home),
    ];
    if terminal {
        let term = std::env::var("TERM");
        env.push(format!("TERM={}", term.unwrap_or_else(|_| "xterm".into())));
    }
    env.extend(wishes.env().clone().unwrap_or_default());
    env.extend(wanted.env.iter().filter_map(|word| variable(word)));
    // A user has none until a program gives it some.
    let own = match user.uid {
        0 => HashSet::from(CAPABILITIES),
        _ => HashSet::new(),
    };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(HashSet::from(CAPABILITIES))
        .inheritable(HashSet::new())
        .ambient(HashSet::new())
        .permitted(own.clone())
        .effective(own);
    let cwd = wanted.workdir.clone().or(wishes.working_dir().clone());
    let cwd = cwd
        .filter(|cwd| !cwd.is_empty())
        .unwrap_or_else(|| "/".into());
    if !cwd.starts_with('/') {
        let text =
            format!("the working directory {cwd:?} is not absolute: say another one by --workdir");
        return Err(Failure::new(text));
    }
    let user = UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .additional_gids(user.groups.clone())
        .build()?;
    let process = ProcessBuilder::default()
        .args(args)
        .env(last_of_each(env))
        .cwd(cwd)
        .user(user)
        .terminal(terminal)
        .no_new_privileges(false)
        .rlimits(Vec::new())
        .capabilities(capabilities.build()?);
    Ok(process.build()?)
}

/// What `-e` means; `None`: this command has no such variable.
fn variable(word: &str) -> Option<String> {
    if word.contains('=') {
        return Some(word.into());
    }
    let value = std::env::var(word).ok()?;
    Some(format!("{word}={value}"))
}

/// Of variables that are set several times the last value, at the first place.
fn last_of_each(env: Vec<String>) -> Vec<String> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut kept: Vec<String> = Vec::new();
    for word in env {
        let key = word.split('=').next().unwrap_or_default().to_owned();
        match places.get(&key) {
            Some(&place) => kept[place] = word,
            None => {
                places.insert(key, kept.len());
                kept.push(word);
            }
        }
    }
    kept
}

/// What every engine lays over an image: names of this machine, and whom to ask for others.
fn files(
    scratch: &Scratch,
    id: &str,
    wanted: &Wanted,
) -> Result<Vec<Mount>, bulkhead_images::Error> {
    let hosts = format!("127.0.0.1 localhost {id}\n::1 localhost {id}\n");
    let mut files = vec![("hosts", hosts), ("hostname", format!("{id}\n"))];
    if wanted.network.is_some()
        && let Some(text) = resolvers()
    {
        files.push(("resolv.conf", text));
    }
    let write = |(name, text): (&str, String)| {
        let source = scratch.write(name, &text)?;
        Ok(mount(source, format!("/etc/{name}"), false))
    };
    files.into_iter().map(write).collect()
}

/// Whom the host asks for names: not itself, which a container cannot reach.
fn resolvers() -> Option<String> {
    let text = fs::read_to_string("/etc/resolv.conf").ok()?;
    match text.contains("nameserver 127.0.0.53") {
        true => fs::read_to_string("/run/systemd/resolve/resolv.conf").ok(),
        false => Some(text),
    }
}

fn mount(source: PathBuf, place: String, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    MountBuilder::default()
        .typ("bind")
        .source(source)
        .destination(place)
        .options(["rbind".to_owned(), access.to_owned()])
        .build()
        .expect("all that a mount has is there")
}

/// `SOURCE:PLACE[:ro]`.
fn bind(word: &str) -> Result<Mount, Failure> {
    let wrong = |why: &str| {
        let text = format!("--volume {word:?}: {why}; say SOURCE:PLACE or SOURCE:PLACE:ro");
        Failure::new(text)
    };
    let parts: Vec<&str> = word.split(':').collect();
    let (source, place, read_only) = match parts.as_slice() {
        [source, place] | [source, place, "rw"] => (source, place, false),
        [source, place, "ro"] => (source, place, true),
        [_, _, _] => return Err(wrong("the last word is neither ro nor rw")),
        _ => return Err(wrong("it has not two parts")),
    };
    if !place.starts_with('/') {
        return Err(wrong("the place in the container is not absolute"));
    }
    // Relative to where the user stands.
    let source = fs::canonicalize(source).map_err(|error| wrong(&error.to_string()))?;
    Ok(mount(source, (*place).into(), read_only))
}

fn enter(spec: &mut Spec, path: PathBuf) {
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut namespaces {
        if namespace.typ() == LinuxNamespaceType::Network {
            namespace.set_path(Some(path.clone()));
        }
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
}

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Show the images that were unpacked: the one that was used last first
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove unpacked images; the archives that they came from stay
    #[command(arg_required_else_help = true)]
    Rm {
        /// Names or keys, as `ls` prints them; six letters of a key are enough
        #[arg(value_name = "IMAGE", conflicts_with = "all")]
        images: Vec<String>,
        /// All that no container runs from
        #[arg(long)]
        all: bool,
    },
}

pub fn image(arguments: &Arguments, config: &Config) -> Result<u8, Failure> {
    let store = Store::at(&config.data_dir);
    match &arguments.verb {
        Verb::Ls { json: true } => {
            let listed = store.list()?;
            println!("{}", serde_json::to_string_pretty(&listed)?);
        }
        Verb::Ls { json: false } => {
            println!(
                "{:12} {:>9} {:>9}  {:6} NAME",
                "KEY", "SIZE", "UNUSED", "STATE"
            );
            for one in store.list()? {
                let state = if one.in_use { "in use" } else { "-" };
                let (key, mib) = (&one.key[..12], one.bytes >> 20);
                println!(
                    "{key} {mib:>5} MiB {:>7} s  {state:6} {}",
                    one.idle_secs, one.name
                );
            }
        }
        Verb::Rm { images, all } => {
            let free = |one: &bulkhead_images::Listed| !one.in_use;
            let images = match all {
                true => {
                    let listed = store.list()?.into_iter();
                    listed.filter(free).map(|one| one.key).collect()
                }
                false => images.clone(),
            };
            for word in images {
                println!("{}: removed", store.remove(&word)?);
            }
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_variable_counts() {
        let env = ["A=1", "B=2", "A=3", "C", "B="].map(String::from).to_vec();
        assert_eq!(last_of_each(env), ["A=3", "B=", "C"]);
    }

    #[test]
    fn volumes_are_two_places_and_a_word() {
        let mount = bind("/usr:/there:ro").unwrap();
        assert_eq!(
            mount.options().as_deref(),
            Some(&["rbind".into(), "ro".into()][..])
        );
        for (word, why) in [
            ("/usr", "two parts"),
            ("/usr:there", "not absolute"),
            ("/usr:/there:rx", "neither"),
            ("/nowhere:/there", "No such file"),
            ("a:b:c:d", "two parts"),
        ] {
            let error = format!("{:?}", bind(word).unwrap_err());
            assert!(error.contains(why), "{word}: {error}");
        }
    }
}
