//! `bulkhead install`, `bulkhead uninstall`: makes Bulkhead known to containerd and Kubernetes, and undoes it.
//!
//! containerd 1.7 replaces a whole plugin's section by that of an imported file, so a drop-in would lose the operator's own settings
//! of CRI. Hence a block at the end of the configuration itself, between two lines by which it is found again. The block also
//! notes what was not there before, so that `uninstall` leaves what `install` found, to the byte.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{diff, failure::Failure};

const BEGIN: &str =
    "# BEGIN bulkhead: written by `bulkhead install`, removed by `bulkhead uninstall`";
const END: &str = "# END bulkhead";
/// Notes in the block, for `uninstall`.
const NO_FILE: &str = "# before: no file";
const NO_NEWLINE: &str = "# before: no newline at the end";
const NO_DIRECTORY: &str = "# before: no directory ";

/// The first line of a configuration that we begin.
const VERSION: &str = "version = 2\n";

const RUNTIME_CLASS: &str = "\
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: bulkhead
handler: bulkhead
# What a machine takes beside its containers' limits: docs/operations.md, \"The size of a machine\".
overhead:
  podFixed:
    memory: 96Mi
";

#[derive(clap::Args)]
pub struct Arguments {
    /// Show what would be changed, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// containerd's configuration
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    containerd_config: PathBuf,
    /// Where the RuntimeClass for Kubernetes goes
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/bulkhead/runtime-class.yaml"
    )]
    runtime_class: PathBuf,
}

/// Adds the runtime to containerd's configuration and writes the RuntimeClass.
pub fn install(arguments: &Arguments) -> Result<u8, Failure> {
    let path = &arguments.containerd_config;
    let old = read(path)?;
    let notes = notes(arguments, old.as_deref());
    let new = with_block(path, old.as_deref().unwrap_or_default(), &notes)?;
    if let Some(old) = &old
        && *old != new
    {
        match arguments.dry_run {
            true => println!("would copy {0} to {0}.before-bulkhead", path.display()),
            false => change(arguments, &backup(path), None, Some(old))?,
        }
    }
    let changed = replace(arguments, path, old.as_deref(), Some(&new))? && !arguments.dry_run;
    let class = read(&arguments.runtime_class)?;
    replace(
        arguments,
        &arguments.runtime_class,
        class.as_deref(),
        Some(RUNTIME_CLASS),
    )?;
    if changed {
        println!(
            "restart containerd, then: kubectl apply -f {}",
            arguments.runtime_class.display()
        );
    }
    Ok(0)
}

/// Takes both out again.
pub fn uninstall(arguments: &Arguments) -> Result<u8, Failure> {
    let path = &arguments.containerd_config;
    let mut made = Vec::new();
    let mut changed = false;
    if let Some(old) = read(path)? {
        let (rest, block) = without_block(path, &old)?;
        let was_there = |note| block.lines().all(|line| line != note);
        // What `install` made from nothing goes as a whole, unless the operator has added something.
        let new = (was_there(NO_FILE) || !rest.is_empty()).then_some(rest);
        changed = replace(arguments, path, Some(&old), new.as_deref())?;
        made = block
            .lines()
            .filter_map(|line| line.strip_prefix(NO_DIRECTORY))
            .map(PathBuf::from)
            .collect();
    }
    for path in [backup(path), arguments.runtime_class.clone()] {
        let old = read(&path)?;
        replace(arguments, &path, old.as_deref(), None)?;
    }
    // Those within others first.
    made.sort_by_key(|directory: &PathBuf| std::cmp::Reverse(directory.components().count()));
    for directory in made.iter().filter(|directory| directory.is_dir()) {
        if arguments.dry_run {
            println!("would remove {} if it is empty then", directory.display());
        } else if fs::remove_dir(directory).is_ok() {
            println!("remove {}", directory.display());
        }
    }
    if changed && !arguments.dry_run {
        println!("restart containerd");
    }
    Ok(0)
}

/// What the block has to remember of the time before it.
fn notes(arguments: &Arguments, old: Option<&str>) -> String {
    let mut notes = String::new();
    match old {
        None => notes += &format!("{NO_FILE}\n"),
        Some(text) if !text.is_empty() && !text.ends_with('\n') => {
            notes += &format!("{NO_NEWLINE}\n");
        }
        Some(_) => {}
    }
    let mut missing: Vec<&Path> = [&arguments.containerd_config, &arguments.runtime_class]
        .into_iter()
        .flat_map(|path| path.ancestors().skip(1))
        .filter(|directory| !directory.as_os_str().is_empty() && !directory.exists())
        .collect();
    missing.sort_unstable();
    missing.dedup();
    for directory in missing {
        notes += &format!("{NO_DIRECTORY}{}\n", directory.display());
    }
    notes
}

fn backup(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".before-bulkhead");
    name.into()
}

fn read(path: &Path) -> Result<Option<String>, Failure> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::new(format!(
            "cannot read {}: {error}",
            path.display()
        ))),
    }
}

/// `true`: something had to be done.
fn replace(
    arguments: &Arguments,
    path: &Path,
    old: Option<&str>,
    new: Option<&str>,
) -> Result<bool, Failure> {
    if old == new {
        return Ok(false);
    }
    change(arguments, path, old, new)?;
    Ok(true)
}

/// Writes a file whole or not at all, or removes it, and says so.
fn change(
    arguments: &Arguments,
    path: &Path,
    old: Option<&str>,
    new: Option<&str>,
) -> Result<(), Failure> {
    let verb = if new.is_some() { "write" } else { "remove" };
    if arguments.dry_run {
        println!("would {verb} {}", path.display());
        print!("{}", diff::unified(path, old, new));
        return Ok(());
    }
    let done = match new {
        None => fs::remove_file(path),
        Some(text) => write(path, text),
    };
    done.map_err(|error| Failure::new(format!("cannot {verb} {}: {error}", path.display())))?;
    println!("{verb} {}", path.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // A link to a file that somebody keeps elsewhere stays a link.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let beside = PathBuf::from(name);
    let put = || {
        fs::write(&beside, text)?;
        if let Ok(old) = fs::metadata(&path) {
            fs::set_permissions(&beside, old.permissions())?;
        }
        fs::rename(&beside, &path)
    };
    put().inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// The configuration with one block of ours at its end; the text as it is when it has that already. What an
/// older block noted stays true; of `notes` come only directories to it.
fn with_block(path: &Path, old: &str, notes: &str) -> Result<String, Failure> {
    let failed = |reason: String| Failure::new(format!("{}: {reason}", path.display()));
    let (mut text, block) = without_block(path, old)?;
    let mut kept: Vec<&str> = block
        .lines()
        .filter(|line| line.starts_with("# before: "))
        .collect();
    for note in notes.lines() {
        let is_of_now = block.is_empty() || note.starts_with(NO_DIRECTORY);
        if is_of_now && !kept.contains(&note) {
            kept.push(note);
        }
    }
    let notes: String = kept.iter().map(|note| format!("{note}\n")).collect();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    // A file without any key of its own: its version comes with us and goes with us.
    let version_line = if has_no_keys(&text) { VERSION } else { "" };
    let judged = format!("{text}{version_line}");
    let table: toml::Table = toml::from_str(&judged).map_err(|error| failed(error.to_string()))?;
    let version = table.get("version").and_then(toml::Value::as_integer);
    let plugin = match version {
        Some(2) => "io.containerd.grpc.v1.cri",
        Some(3) => "io.containerd.cri.v1.runtime",
        other => {
            let other = other.map_or("no version".into(), |version| format!("version {version}"));
            let reason =
                format!("it has {other}; 2 and 3 are known: see `containerd config migrate`");
            return Err(failed(reason));
        }
    };
    let disabled = table
        .get("disabled_plugins")
        .and_then(toml::Value::as_array);
    if disabled.is_some_and(|list| {
        list.iter()
            .any(|name| name.as_str() == Some("cri") || name.as_str() == Some(plugin))
    }) {
        return Err(failed(
            "disabled_plugins turns CRI off, which Kubernetes needs; take it out of that list"
                .into(),
        ));
    }
    text += &format!(
        "{BEGIN}\n{notes}{version_line}[plugins.\"{plugin}\".containerd.runtimes.bulkhead]\n  runtime_type = \"io.containerd.bulkhead.v1\"\n  privileged_without_host_devices = true\n{END}\n"
    );
    match toml::from_str::<toml::Table>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(failed(format!(
            "a runtime \"bulkhead\" cannot be added: {}; is there one already?",
            error.message()
        ))),
    }
}

/// The configuration as it was before our block came, and the block's lines; "" when there is none.
fn without_block(path: &Path, text: &str) -> Result<(String, String), Failure> {
    let (mut kept, mut block) = (String::new(), String::new());
    let mut inside = false;
    let mut is_last = false;
    for line in text.split_inclusive('\n') {
        match line.trim_end() {
            BEGIN => inside = true,
            END if inside => (inside, is_last) = (false, true),
            _ if inside => block += line,
            _ => (kept, is_last) = (kept + line, false),
        }
    }
    if inside {
        // Everything after it could be the operator's.
        return Err(Failure::new(format!(
            "{}: the line {BEGIN:?} has no {END:?} after it: take out by hand what belongs to bulkhead",
            path.display()
        )));
    }
    // What came after the block needs the newline.
    if is_last && block.lines().any(|line| line == NO_NEWLINE) {
        kept.pop();
    }
    // The version came with the block, and now there is something that needs it.
    let table = toml::from_str::<toml::Table>(&kept).unwrap_or_default();
    if block.contains(VERSION) && !table.is_empty() && !table.contains_key("version") {
        kept.insert_str(0, VERSION);
    }
    Ok((kept, block))
}

fn has_no_keys(text: &str) -> bool {
    toml::from_str::<toml::Table>(text).is_ok_and(|table| table.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &Path, dry_run: bool) -> Arguments {
        Arguments {
            dry_run,
            containerd_config: dir.join("containerd/config.toml"),
            runtime_class: dir.join("etc/bulkhead/class.yaml"),
        }
    }

    #[test]
    fn installing_twice_and_uninstalling_leaves_everything_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("containerd/config.toml");
        let text = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd]\n  default_runtime_name = 'runc'";
        fs::create_dir(config.parent().unwrap()).unwrap();
        fs::write(&config, text).unwrap();
        let run = arguments(dir.path(), false);
        assert!(install(&arguments(dir.path(), true)).is_ok());
        assert_eq!(fs::read_to_string(&config).unwrap(), text);
        install(&run).unwrap();
        let once = fs::read_to_string(&config).unwrap();
        let table: toml::Table = toml::from_str(&once).unwrap();
        let runtimes = &table["plugins"]["io.containerd.cri.v1.runtime"]["containerd"];
        assert_eq!(
            runtimes["runtimes"]["bulkhead"]["runtime_type"].as_str(),
            Some("io.containerd.bulkhead.v1")
        );
        assert_eq!(runtimes["default_runtime_name"].as_str(), Some("runc"));
        assert_eq!(fs::read_to_string(backup(&config)).unwrap(), text);
        install(&run).unwrap();
        assert_eq!(fs::read_to_string(&config).unwrap(), once);
        uninstall(&run).unwrap();
        uninstall(&run).unwrap();
        assert_eq!(fs::read_to_string(&config).unwrap(), text);
        assert!(!run.runtime_class.exists() && !backup(&config).exists());
    }

    #[test]
    fn a_configuration_is_made_from_nothing_and_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = arguments(dir.path(), false);
        install(&run).unwrap();
        let text = fs::read_to_string(&run.containerd_config).unwrap();
        assert!(text.contains("\nversion = 2\n") && text.contains("io.containerd.grpc.v1.cri"));
        toml::from_str::<toml::Table>(&text).unwrap();
        install(&run).unwrap();
        assert_eq!(fs::read_to_string(&run.containerd_config).unwrap(), text);
        uninstall(&run).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn uninstalling_gives_back_each_byte_that_was_there() {
        for text in [
            "",
            "\n",
            "# a comment",
            "version = 2",
            "version = 2\n",
            "version = 3\n\n\n",
            "version = 2\r\nroot = \"/x\"\r\n",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let run = arguments(dir.path(), false);
            fs::create_dir_all(run.containerd_config.parent().unwrap()).unwrap();
            fs::write(&run.containerd_config, text).unwrap();
            install(&run).unwrap();
            assert_ne!(fs::read_to_string(&run.containerd_config).unwrap(), text);
            uninstall(&run).unwrap();
            let now = fs::read_to_string(&run.containerd_config).unwrap();
            assert_eq!(now, text);
            let left = fs::read_dir(dir.path()).unwrap();
            assert_eq!(left.count(), 1, "the directory of {text:?} alone");
        }
    }

    #[test]
    fn what_came_since_then_stays() {
        let dir = tempfile::tempdir().unwrap();
        let run = arguments(dir.path(), false);
        install(&run).unwrap();
        let mut text = fs::read_to_string(&run.containerd_config).unwrap();
        text += "[grpc]\n  address = \"/a\"\n";
        fs::write(&run.containerd_config, &text).unwrap();
        let other = run.runtime_class.with_file_name("config.toml");
        fs::write(&other, "").unwrap();
        uninstall(&run).unwrap();
        assert_eq!(
            fs::read_to_string(&run.containerd_config).unwrap(),
            "version = 2\n[grpc]\n  address = \"/a\"\n"
        );
        assert!(other.exists());
    }

    #[test]
    fn a_link_stays_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let run = arguments(dir.path(), false);
        fs::create_dir_all(run.containerd_config.parent().unwrap()).unwrap();
        let real = dir.path().join("real.toml");
        fs::write(&real, "version = 2\n").unwrap();
        std::os::unix::fs::symlink(&real, &run.containerd_config).unwrap();
        install(&run).unwrap();
        assert!(run.containerd_config.is_symlink());
        assert!(fs::read_to_string(&real).unwrap().contains(BEGIN));
    }

    #[test]
    fn a_block_whose_end_is_gone_is_not_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let run = arguments(dir.path(), false);
        install(&run).unwrap();
        let text = fs::read_to_string(&run.containerd_config).unwrap();
        let text = format!("{}[grpc]\n", text.replace(END, ""));
        fs::write(&run.containerd_config, &text).unwrap();
        assert!(uninstall(&run).is_err() && install(&run).is_err());
        assert_eq!(fs::read_to_string(&run.containerd_config).unwrap(), text);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let path = Path::new("c.toml");
        for bad in [
            "version = 1\n",
            "root = \"/x\"\n",
            "version = ",
            "version = 2\ndisabled_plugins = [\"cri\"]\n",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.bulkhead]\n",
        ] {
            assert!(with_block(path, bad, "").is_err(), "{bad}");
        }
    }
}
