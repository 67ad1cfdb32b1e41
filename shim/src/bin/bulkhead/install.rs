//! `bulkhead install`, `bulkhead uninstall`: makes Bulkhead known to containerd and Kubernetes, and undoes it.
//!
//! containerd 1.7 replaces a whole plugin's section by that of an imported file, so a drop-in would lose the operator's own settings
//! of CRI. Hence a block at the end of the configuration itself, between two lines by which it is found again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::failure::Failure;

const BEGIN: &str =
    "# BEGIN bulkhead: written by `bulkhead install`, removed by `bulkhead uninstall`";
const END: &str = "# END bulkhead";

const RUNTIME_CLASS: &str = "\
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: bulkhead
handler: bulkhead
";

#[derive(clap::Args)]
pub struct Arguments {
    /// Say what would be done, and do nothing
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
    let new = with_block(path, old.as_deref().unwrap_or_default())?;
    if let Some(old) = &old
        && *old != new
    {
        change(arguments, &backup(path), Some(old))?;
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
    if let Some(old) = read(path)? {
        let new = without_block(&old);
        // What `install` made from nothing goes as a whole.
        let ours_alone = old != new && new.trim() == "version = 2";
        replace(arguments, path, Some(&old), (!ours_alone).then_some(&new))?;
    }
    for path in [backup(path), arguments.runtime_class.clone()] {
        let old = read(&path)?;
        replace(arguments, &path, old.as_deref(), None)?;
    }
    Ok(0)
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
    change(arguments, path, new)?;
    Ok(true)
}

/// Writes a file whole or not at all, or removes it, and says so.
fn change(arguments: &Arguments, path: &Path, new: Option<&str>) -> Result<(), Failure> {
    let verb = if new.is_some() { "write" } else { "remove" };
    if arguments.dry_run {
        println!("would {verb} {}", path.display());
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
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let beside = PathBuf::from(name);
    fs::write(&beside, text)?;
    if let Ok(old) = fs::metadata(path) {
        fs::set_permissions(&beside, old.permissions())?;
    }
    fs::rename(&beside, path)
}

/// The configuration with one block of ours at its end; the text as it is when it has that already.
fn with_block(path: &Path, old: &str) -> Result<String, Failure> {
    let failed = |reason: String| Failure::new(format!("{}: {reason}", path.display()));
    let mut text = without_block(old);
    if text.trim().is_empty() {
        text = "version = 2\n".into();
    }
    let table: toml::Table = toml::from_str(&text).map_err(|error| failed(error.to_string()))?;
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
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text += &format!(
        "{BEGIN}\n[plugins.\"{plugin}\".containerd.runtimes.bulkhead]\n  runtime_type = \"io.containerd.bulkhead.v1\"\n  privileged_without_host_devices = true\n{END}\n"
    );
    match toml::from_str::<toml::Table>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(failed(format!(
            "a runtime \"bulkhead\" cannot be added: {}; is there one already?",
            error.message()
        ))),
    }
}

fn without_block(text: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in text.split_inclusive('\n') {
        match line.trim_end() {
            BEGIN => inside = true,
            END if inside => inside = false,
            _ if !inside => kept += line,
            _ => {}
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &Path, dry_run: bool) -> Arguments {
        Arguments {
            dry_run,
            containerd_config: dir.join("containerd/config.toml"),
            runtime_class: dir.join("class.yaml"),
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
        assert_eq!(fs::read_to_string(&config).unwrap(), format!("{text}\n"));
        assert!(!run.runtime_class.exists() && !backup(&config).exists());
    }

    #[test]
    fn a_configuration_is_made_from_nothing_and_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = arguments(dir.path(), false);
        install(&run).unwrap();
        let text = fs::read_to_string(&run.containerd_config).unwrap();
        assert!(text.starts_with("version = 2\n") && text.contains("io.containerd.grpc.v1.cri"));
        uninstall(&run).unwrap();
        assert!(!run.containerd_config.exists());
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
            assert!(with_block(path, bad).is_err(), "{bad}");
        }
    }
}
