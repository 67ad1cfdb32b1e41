//! Templates: machines that were booted until their agent was idle, and saved. Pods go on from
//! them in the place of booting.
//!
//! ```text
//! key     what a machine is made of, as it can be told without reading it ─► a name
//! store   STATE/.templates: what was saved, by that name; refused when anything differs
//! ```
//!
//! Who makes one is `pod::template`: it boots a machine as a pod does.
//! docs/adr/0020-templates.md has the reasons.
#![forbid(unsafe_code)]

mod key;
mod store;
#[cfg(test)]
mod tests;

pub use key::{Basis, Host, Identity, Key, Shape};
pub use store::{Begun, Building, Files, Listed, Store, Swept};

/// From what a pod's machine goes on.
#[derive(Clone, Debug, Default)]
pub enum Origin {
    /// Nobody has looked for a template: it boots.
    #[default]
    Boot,
    /// It boots although there could be one.
    Cold {
        /// Why.
        reason: String,
        /// What would be of use to the next pod, if somebody made it.
        missing: Option<Box<Basis>>,
    },
    /// This template.
    Template(Key),
}

impl Origin {
    /// Looks for the template of a machine: its files as well, if there is one.
    pub fn find(store: &Store, basis: Basis) -> (Origin, Option<Files>) {
        let key = basis.key();
        if let Some(files) = store.open(&basis) {
            store.touch(&key);
            return (Origin::Template(key), Some(files));
        }
        let held_off = store.hold_off(&key);
        let cold = Origin::Cold {
            missing: held_off.is_none().then(|| Box::new(basis)),
            reason: held_off.unwrap_or_else(|| "there is no template of its shape yet".into()),
        };
        (cold, None)
    }

    /// It boots, for this reason.
    pub fn cold(reason: impl Into<String>) -> Origin {
        Origin::Cold {
            reason: reason.into(),
            missing: None,
        }
    }

    /// Whether it goes on from one.
    pub fn is_template(&self) -> bool {
        matches!(self, Origin::Template(_))
    }
}
