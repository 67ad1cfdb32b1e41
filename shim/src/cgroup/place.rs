//! Where a pod's cgroup is: `linux.cgroupsPath` of config.json when given, absolute from the cgroup
//! root (OCI config-linux.md#cgroups-path), a relative one beneath `/bulkhead`; else
//! `/bulkhead/NAMESPACE/SANDBOX`.

use std::path::{Component, Path, PathBuf};

use super::{Error, ROOT};

/// The directory for a pod.
pub fn place(
    cgroups_path: Option<&Path>,
    namespace: &str,
    sandbox: &str,
) -> Result<PathBuf, Error> {
    let own = Path::new(ROOT).join("bulkhead");
    let Some(path) = cgroups_path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(own.join(namespace).join(sandbox));
    };
    let text = path.to_string_lossy();
    if !path.is_absolute() && text.matches(':').count() == 2 {
        let place =
            systemd_place(&text).ok_or_else(|| Error::Systemd(text.clone().into_owned()))?;
        return Ok(Path::new(ROOT).join(place));
    }
    let plain = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::RootDir);
    if !path.components().all(|part| plain(&part)) || path == Path::new("/") {
        return Err(Error::Path(path.into()));
    }
    Ok(match path.strip_prefix("/") {
        Ok(absolute) => Path::new(ROOT).join(absolute),
        Err(_) => own.join(path),
    })
}

/// `slice:prefix:name`, which kubelets with systemd's driver write: the scope PREFIX-NAME.scope in
/// the slice, where a dash in a slice's name is a level (systemd.slice(5)). The slice is there; its
/// scope is made by us, without systemd.
fn systemd_place(text: &str) -> Option<PathBuf> {
    let mut parts = text.splitn(3, ':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    let plain = |word: &str| !word.contains('/') && !word.starts_with('.');
    if name.is_empty() || ![slice, prefix, name].into_iter().all(plain) {
        return None;
    }
    let mut place = PathBuf::new();
    match slice {
        "" => place.push("system.slice"),
        "-.slice" => {}
        slice => {
            let stem = slice.strip_suffix(".slice")?;
            if stem.split('-').any(str::is_empty) {
                return None;
            }
            let ends = stem.match_indices('-').map(|(index, _)| index);
            for end in ends.chain([stem.len()]) {
                place.push(format!("{}.slice", &stem[..end]));
            }
        }
    }
    place.push(match prefix {
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    });
    Some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_follows_cgroups_path() {
        let place = |path: &str| place(Some(Path::new(path)), "default", "a");
        assert_eq!(
            super::place(None, "default", "a").unwrap(),
            Path::new("/sys/fs/cgroup/bulkhead/default/a")
        );
        assert_eq!(
            place("").unwrap(),
            Path::new("/sys/fs/cgroup/bulkhead/default/a")
        );
        assert_eq!(place("/x/y").unwrap(), Path::new("/sys/fs/cgroup/x/y"));
        assert_eq!(place("x").unwrap(), Path::new("/sys/fs/cgroup/bulkhead/x"));
        assert_eq!(
            place("kubepods-burstable-pod1.slice:cri-containerd:a").unwrap(),
            Path::new(
                "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-a.scope"
            )
        );
        assert_eq!(
            place(":run:a").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/run-a.scope")
        );
        for bad in [
            "user:run:a",
            "a--b.slice:run:a",
            "a.slice:run:../x",
            "a.slice:run:",
        ] {
            assert!(matches!(place(bad), Err(Error::Systemd(_))), "{bad}");
        }
        assert!(matches!(place("/x/../../etc"), Err(Error::Path(_))));
        assert!(matches!(place("/"), Err(Error::Path(_))));
    }
}
