//! Who a container runs as, by the image's own lists (passwd(5), group(5)).

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use linux::path::open_in_root;
use nix::{errno::Errno, fcntl::OFlag};

use super::{Error, Image, source::open_place};

/// Longest list that is read, in bytes.
const MAX_LIST: u64 = 1 << 20;

/// Who a container runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// In the container.
    pub uid: u32,
    /// Its first group.
    pub gid: u32,
    /// Further groups that list it.
    pub groups: Vec<u32>,
    /// `/` where no list says.
    pub home: String,
}

impl Image {
    /// The user of `USER[:GROUP]`, names or numbers; nothing is root.
    ///
    /// # Errors
    /// The image does not know the name.
    pub fn user(&self, word: &str) -> Result<User, Error> {
        let (passwd, group) = (self.list("etc/passwd")?, self.list("etc/group")?);
        let passwd: Vec<Vec<&str>> = fields(&passwd);
        let group: Vec<Vec<&str>> = fields(&group);
        let (user, wanted) = match word.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (word, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let unknown = |what: &str, name: &str| Error::Wrong {
            what: "user",
            reason: format!("there is no {what} {name:?}"),
        };
        let line = passwd.iter().find(|line| line[0] == user);
        let line = line.or_else(|| passwd.iter().find(|line| line.get(2) == Some(&user)));
        let number = |index: usize| line.and_then(|line| line.get(index)?.parse::<u32>().ok());
        let uid = match user.parse() {
            Ok(uid) => uid,
            Err(_) => number(2).ok_or_else(|| unknown("user", user))?,
        };
        let gid = match wanted {
            None => number(3).unwrap_or(0),
            Some(name) => match name.parse() {
                Ok(gid) => gid,
                Err(_) => group
                    .iter()
                    .find(|line| line[0] == name)
                    .and_then(|line| line.get(2)?.parse().ok())
                    .ok_or_else(|| unknown("group", name))?,
            },
        };
        in_range(uid, gid)?;
        let name = line.map_or(user, |line| line[0]);
        let lists = |line: &&Vec<&str>| {
            let members = line.get(3).copied().unwrap_or_default();
            members.split(',').any(|member| member == name)
        };
        let groups = match wanted {
            // As engines: who names a group has that one.
            Some(_) => Vec::new(),
            None => group
                .iter()
                .filter(lists)
                .filter_map(|line| line.get(2)?.parse().ok())
                .collect(),
        };
        let home = line.and_then(|line| line.get(5).copied());
        let home = home.filter(|home| home.starts_with('/')).unwrap_or("/");
        Ok(User {
            uid,
            gid,
            groups,
            home: home.into(),
        })
    }

    /// A file of the image, as text; nothing if there is none. No link leads out of the image.
    fn list(&self, path: &str) -> Result<String, Error> {
        let read = || -> std::io::Result<String> {
            let root: OwnedFd = File::open(&self.root)?.into();
            let place = match open_in_root(root.as_fd(), Path::new(path), OFlag::O_PATH) {
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(String::new()),
                place => File::from(place?),
            };
            let mut text = Vec::new();
            if place.metadata()?.is_file() {
                open_place(&place)?.take(MAX_LIST).read_to_end(&mut text)?;
            }
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        read().map_err(Error::io("read", self.root.join(path)))
    }
}

/// The last numbers mean "no change" to the kernel, and engines refuse those above.
fn in_range(uid: u32, gid: u32) -> Result<(), Error> {
    match uid.max(gid) > i32::MAX as u32 {
        false => Ok(()),
        true => Err(Error::Wrong {
            what: "user",
            reason: format!("{uid}:{gid} is out of range: {} is the last", i32::MAX),
        }),
    }
}

fn fields(list: &str) -> Vec<Vec<&str>> {
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split(':').collect()).collect()
}
