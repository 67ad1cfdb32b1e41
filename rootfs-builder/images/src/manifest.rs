//! Which layers an image has, and what its maker wants run.

use std::io;

use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os,
};
use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

use super::{
    Error,
    source::{Source, hex},
};

/// How deep an index may be in an index.
const MAX_DEPTH: usize = 4;
/// Most layers: overlayfs has 500, engines stop at 127.
const MAX_LAYERS: usize = 500;
/// What containerd calls an image in the index that it exports.
const CONTAINERDS_NAME: &str = "io.containerd.image.name";

/// An image of this machine's platform.
pub(crate) struct Found {
    /// SHA-256 of the configuration, which names the contents of all layers: hexadecimal.
    pub key: String,
    /// As the configuration is written.
    pub text: Vec<u8>,
    /// From the lowest on: the part's name, and the SHA-256 of what it has unpacked.
    pub layers: Vec<(String, String)>,
}

/// An entry of `docker save`'s manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Finds the image of this name, or the only one.
pub(crate) fn find(source: &Source, name: Option<&str>) -> Result<Found, Error> {
    match () {
        () if source.has("index.json") => of_layout(source, name),
        () if source.is_archive() && source.has("manifest.json") => of_docker(source, name),
        () => Err(Error::NoImage(source.path.clone())),
    }
}

fn parse<T: DeserializeOwned>(what: &'static str, text: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|source| Error::Format { what, source })
}

fn wrong(what: &'static str, reason: impl Into<String>) -> Error {
    let reason = reason.into();
    Error::Wrong { what, reason }
}

/// Of those in a place the one that is called so; without a name the only one.
fn choose<T>(
    source: &Source,
    all: Vec<(Vec<String>, T)>,
    name: Option<&str>,
) -> Result<Vec<T>, Error> {
    let path = source.path.clone();
    let mut names: Vec<String> = all.iter().flat_map(|(names, _)| names.clone()).collect();
    names.dedup();
    let Some(name) = name else {
        let mut firsts: Vec<&String> = all.iter().filter_map(|(names, _)| names.first()).collect();
        firsts.dedup();
        return match firsts.len() > 1 {
            true => Err(Error::Several { path, names }),
            false => Ok(all.into_iter().map(|(_, one)| one).collect()),
        };
    };
    let exact = |full: &String| full.as_str() == name;
    // `latest` finds `docker.io/library/alpine:latest`.
    let by_end = |full: &String| {
        let rest = full.strip_suffix(name);
        rest.is_some_and(|rest| rest.ends_with([':', '/']))
    };
    let is_exact = all.iter().any(|(names, _)| names.iter().any(exact));
    let is_it = |full: &String| if is_exact { exact(full) } else { by_end(full) };
    let found: Vec<(Vec<String>, T)> = all
        .into_iter()
        .filter(|(names, _)| names.iter().any(is_it))
        .collect();
    let mut meant: Vec<&String> = found
        .iter()
        .filter_map(|(names, _)| names.first())
        .collect();
    meant.dedup();
    if meant.len() > 1 {
        let names = meant.into_iter().cloned().collect();
        return Err(Error::Several { path, names });
    }
    let found: Vec<T> = found.into_iter().map(|(_, one)| one).collect();
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::Unknown {
            path,
            name: name.into(),
            names,
        }),
    }
}

fn of_layout(source: &Source, name: Option<&str>) -> Result<Found, Error> {
    let index: ImageIndex = parse("index.json", &source.document("index.json", "index.json")?)?;
    let named = |descriptor: &Descriptor| {
        let notes = descriptor.annotations().clone().unwrap_or_default();
        let names = [CONTAINERDS_NAME, ANNOTATION_REF_NAME];
        names
            .iter()
            .filter_map(|key| notes.get(*key).cloned())
            .collect::<Vec<_>>()
    };
    let all = index
        .manifests()
        .iter()
        .map(|one| (named(one), one.clone()));
    let mut others = Vec::new();
    let mut left: Vec<(Descriptor, usize)> = choose(source, all.collect(), name)?
        .into_iter()
        .rev()
        .map(|one| (one, 0))
        .collect();
    while let Some((descriptor, depth)) = left.pop() {
        if let Some(platform) = descriptor.platform()
            && (*platform.os() != Os::Linux || *platform.architecture() != Arch::Amd64)
        {
            others.push(format!("{}/{}", platform.os(), platform.architecture()));
            continue;
        }
        let kind = descriptor.media_type().to_string();
        if kind.ends_with("image.index.v1+json") || kind.ends_with("manifest.list.v2+json") {
            if depth == MAX_DEPTH {
                return Err(wrong("index.json", "it leads from index to index"));
            }
            let inner: ImageIndex = parse("index", &blob(source, "index", &descriptor)?.1)?;
            let inner = inner.manifests().iter().rev();
            left.extend(inner.map(|one| (one.clone(), depth + 1)));
            continue;
        }
        let text = blob(source, "manifest", &descriptor)?.1;
        let manifest: ImageManifest = parse("manifest", &text)?;
        let (name, text) = blob(source, "configuration", manifest.config())?;
        let key = name.rsplit('/').next().unwrap_or_default().to_owned();
        let layers = manifest.layers().iter().map(|layer| {
            let kind = layer.media_type().to_string();
            match kind.contains("tar") {
                true => place(layer),
                false => Err(wrong(
                    "manifest",
                    format!("it has a layer of the kind {kind:?}"),
                )),
            }
        });
        return complete(key, text, layers.collect::<Result<_, _>>()?);
    }
    match others.is_empty() {
        true => Err(wrong("index.json", "it has no manifest")),
        false => Err(Error::Platform(others.join(", "))),
    }
}

fn of_docker(source: &Source, name: Option<&str>) -> Result<Found, Error> {
    let text = source.document("manifest.json", "manifest.json")?;
    let all: Vec<Saved> = parse("manifest.json", &text)?;
    let all = all
        .into_iter()
        .map(|mut one| (one.repo_tags.take().unwrap_or_default(), one));
    let mut found = choose(source, all.collect(), name)?.into_iter();
    let saved = found
        .next()
        .ok_or_else(|| wrong("manifest.json", "it is empty"))?;
    if name.is_none() && found.next().is_some() {
        return Err(wrong(
            "manifest.json",
            "it has several images, which have no names",
        ));
    }
    let text = source.document("configuration", &saved.config)?;
    complete(hex(&Sha256::digest(&text)), text, saved.layers)
}

/// The name of what a descriptor describes (OCI image-layout.md#blobs).
fn place(descriptor: &Descriptor) -> Result<String, Error> {
    let digest = descriptor.digest().to_string();
    match digest.strip_prefix("sha256:") {
        Some(sum) if is_sum(sum) => Ok(format!("blobs/sha256/{sum}")),
        _ => Err(wrong(
            "manifest",
            format!("the digest {digest:?} is none of SHA-256"),
        )),
    }
}

fn is_sum(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A document that is what its digest says, and its name.
fn blob(
    source: &Source,
    what: &'static str,
    descriptor: &Descriptor,
) -> Result<(String, Vec<u8>), Error> {
    let name = place(descriptor)?;
    let text = source.document(what, &name)?;
    let found = hex(&Sha256::digest(&text));
    match name.ends_with(&found) {
        true => Ok((name, text)),
        false => Err(Error::Digest {
            what: what.into(),
            expected: name.rsplit('/').next().unwrap_or_default().into(),
            found,
        }),
    }
}

fn complete(key: String, text: Vec<u8>, names: Vec<String>) -> Result<Found, Error> {
    let config: ImageConfiguration = parse("configuration", &text)?;
    let (os, architecture) = (config.os(), config.architecture());
    if *os != Os::Linux || *architecture != Arch::Amd64 {
        return Err(Error::Platform(format!("{os}/{architecture}")));
    }
    let sums = config.rootfs().diff_ids();
    if sums.len() != names.len() || names.len() > MAX_LAYERS {
        let text = format!(
            "it names the contents of {} layers, and there are {} (at most {MAX_LAYERS})",
            sums.len(),
            names.len()
        );
        return Err(wrong("configuration", text));
    }
    let sums = sums.iter().map(|sum| match sum.strip_prefix("sha256:") {
        Some(sum) if is_sum(sum) => Ok(sum.to_owned()),
        _ => Err(wrong(
            "configuration",
            format!("the digest {sum:?} is none of SHA-256"),
        )),
    });
    let layers = names.into_iter().zip(sums.collect::<Result<Vec<_>, _>>()?);
    Ok(Found {
        layers: layers.collect(),
        key,
        text,
    })
}

/// Checks that a layer was what its digest says.
pub(crate) fn check(number: usize, expected: &str, found: io::Result<String>) -> Result<(), Error> {
    match found {
        Ok(found) if found == expected => Ok(()),
        Ok(found) => Err(Error::Digest {
            what: format!("layer {number}"),
            expected: expected.into(),
            found,
        }),
        Err(source) => Err(Error::Entry {
            layer: number,
            entry: "its end".into(),
            source,
        }),
    }
}
