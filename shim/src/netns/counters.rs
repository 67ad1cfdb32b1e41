//! What has passed through a pod's interfaces, from the kernel's own counters, without asking the VMM.

use serde::Serialize;

use super::{
    Error, Step,
    message::{Message, field},
    namespace::Namespace,
    release::Redirect,
};

/// Counters of one link since it was made, as its kernel counts: received is what the link took in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Frames.
    pub rx_packets: u64,
    /// Frames.
    pub tx_packets: u64,
    /// Bytes.
    pub rx_bytes: u64,
    /// Bytes.
    pub tx_bytes: u64,
    /// Frames that were broken.
    pub rx_errors: u64,
    /// Frames that could not be sent.
    pub tx_errors: u64,
    /// Frames for which there was no room.
    pub rx_dropped: u64,
    /// Of a tap: those that the guest did not take in time.
    pub tx_dropped: u64,
}

/// Counters of an interface and its tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// The interface's name.
    pub interface: String,
    /// The tap's.
    pub tap: String,
    /// Of the interface; none when it is gone.
    pub outside: Option<Traffic>,
    /// Of the tap, whose transmitted frames are the guest's received ones; none when it is gone.
    pub inside: Option<Traffic>,
}

/// The counters of redirects of one namespace, such as one ledger has; those of another namespace are left out, and all are when
/// the namespace is gone.
pub fn counters<'a>(
    redirects: impl IntoIterator<Item = &'a Redirect>,
) -> Result<Vec<Counters>, Error> {
    let redirects: Vec<&Redirect> = redirects.into_iter().collect();
    let Some(first) = redirects.first() else {
        return Ok(Vec::new());
    };
    let Some(namespace) = Namespace::find(&first.network, first.inode)? else {
        return Ok(Vec::new());
    };
    let links = namespace.enter(|socket| {
        let ask = Message::new(libc::RTM_GETLINK, 0);
        socket.dump(ask).step("list", "links")
    })?;
    let count = |redirect: &&Redirect| Counters {
        interface: redirect.interface.clone(),
        tap: redirect.tap.clone(),
        outside: links
            .iter()
            .find(|link| link.number(field::INDEX) == redirect.index)
            .and_then(traffic),
        inside: links
            .iter()
            .find(|link| link.get_text(libc::IFLA_IFNAME).as_deref() == Some(&redirect.tap))
            .and_then(traffic),
    };
    Ok(redirects
        .iter()
        .filter(|redirect| redirect.inode == first.inode)
        .map(count)
        .collect())
}

/// `struct rtnl_link_stats64` begins with these eight, in this order.
fn traffic(link: &Message) -> Option<Traffic> {
    let bytes = link.get(libc::IFLA_STATS64)?;
    let word = |at: usize| {
        let word = bytes.get(at * 8..at * 8 + 8)?.try_into().ok()?;
        Some(u64::from_ne_bytes(word))
    };
    Some(Traffic {
        rx_packets: word(0)?,
        tx_packets: word(1)?,
        rx_bytes: word(2)?,
        tx_bytes: word(3)?,
        rx_errors: word(4)?,
        tx_errors: word(5)?,
        rx_dropped: word(6)?,
        tx_dropped: word(7)?,
    })
}
