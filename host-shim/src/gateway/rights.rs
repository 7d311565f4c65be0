//! Who may do what in which repository. Deciding is pure; what it needs to know comes from an
//! [`Authorizer`].
//!
//! | repository | pull | push | delete |
//! |---|---|---|---|
//! | `base/*` | everybody with a token | administrators | administrators |
//! | `<tenant>/*` | the tenant, its readers too | the tenant | the tenant |
//! | `builds/<id>` | the tenant of the build, its readers too | nobody: builds push it | administrators |
//! | `upstream/*` | nobody: builds do, by [`super::upstream`] | nobody | nobody |
//! | others | administrators | administrators | administrators |
//!
//! Administrators may pull and delete whatever others may, and push whatever somebody may.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::path::Name;
use crate::build::{BuildId, Tenant};
use crate::store::{Role, StoreError};

/// What can be done with a repository, in the words of the distribution token spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Read manifests, blobs and tags.
    Pull,
    /// Write them.
    Push,
    /// Delete them.
    Delete,
}

impl Action {
    /// Every action.
    pub const ALL: [Self; 3] = [Self::Pull, Self::Push, Self::Delete];

    /// The action's name in a scope.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Delete => "delete",
        }
    }
}

/// Whom an API token speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Whose token it is.
    pub tenant: Tenant,
    /// What it may do.
    pub role: Role,
}

/// What the gateway asks the store.
#[async_trait]
pub trait Authorizer: Send + Sync + 'static {
    /// Whom a valid API token speaks for; `None` for an unknown, expired or revoked one.
    async fn api_token(&self, token: &str) -> Result<Option<Caller>, StoreError>;
    /// Whose build it is; `None` for an unknown one.
    async fn build_owner(&self, id: &BuildId) -> Result<Option<Tenant>, StoreError>;
}

/// Which part of the registry a name belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space<'a> {
    /// `base/*`
    Base,
    /// `builds/<id>`; the text may be no id at all.
    Build(&'a str),
    /// `upstream/*`
    Upstream,
    /// `<first>/*`, where that may be a tenant's name.
    Named(&'a str),
    /// A name without a slash.
    Bare,
}

impl<'a> Space<'a> {
    /// The space of a name.
    pub fn of(name: &'a Name) -> Self {
        match name.split_first() {
            ("base", _) => Self::Base,
            ("upstream", _) => Self::Upstream,
            ("builds", rest) => Self::Build(rest.unwrap_or_default()),
            (first, Some(_)) => Self::Named(first),
            (_, None) => Self::Bare,
        }
    }
}

/// Whether the caller may do this; `owner` is the tenant of the build for a `builds/<id>`.
pub fn allowed(caller: &Caller, space: Space<'_>, owner: Option<&Tenant>, action: Action) -> bool {
    let admin = caller.role == Role::Admin;
    match space {
        Space::Upstream => false,
        Space::Base => admin || action == Action::Pull,
        Space::Build(_) => match action {
            Action::Pull => admin || owner == Some(&caller.tenant),
            Action::Push => false,
            Action::Delete => admin,
        },
        Space::Named(first) if first == caller.tenant.as_str() => {
            action == Action::Pull || caller.role >= Role::Tenant
        }
        Space::Named(_) | Space::Bare => admin,
    }
}

/// Those of the actions that the caller may do in the repository.
pub async fn granted(
    authorizer: &dyn Authorizer,
    caller: &Caller,
    name: &Name,
    wanted: &[Action],
) -> Result<Vec<Action>, StoreError> {
    let space = Space::of(name);
    let owner = match space {
        Space::Build(id) => match BuildId::new(id) {
            Ok(id) => authorizer.build_owner(&id).await?,
            Err(_) => None,
        },
        _ => None,
    };
    let allowed = |action: &Action| allowed(caller, space, owner.as_ref(), *action);
    Ok(wanted.iter().copied().filter(allowed).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The table above, for tenant `a`: pull, push, delete of reader, tenant and admin.
    #[test]
    fn the_table_holds() {
        let a = Tenant::new("a").unwrap();
        let rows: &[(&str, Option<&str>, [&str; 3])] = &[
            ("base/debian", None, ["r--", "r--", "rwd"]),
            ("base", None, ["r--", "r--", "rwd"]),
            ("a/app", None, ["r--", "rwd", "rwd"]),
            ("a/team/app", None, ["r--", "rwd", "rwd"]),
            ("a", None, ["---", "---", "rwd"]),
            ("ab/app", None, ["---", "---", "rwd"]),
            ("b/app", None, ["---", "---", "rwd"]),
            ("b/a/app", None, ["---", "---", "rwd"]),
            ("builds/x", Some("a"), ["r--", "r--", "r-d"]),
            ("builds/x", Some("b"), ["---", "---", "r-d"]),
            ("builds/x", None, ["---", "---", "r-d"]),
            ("builds", None, ["---", "---", "r-d"]),
            ("upstream/docker.io/x", None, ["---", "---", "---"]),
        ];
        for (name, owner, expected) in rows {
            let name = Name::parse(name).unwrap();
            let owner = owner.map(|o| Tenant::new(o).unwrap());
            for (role, expected) in [Role::Reader, Role::Tenant, Role::Admin].iter().zip(expected) {
                let caller = Caller { tenant: a.clone(), role: *role };
                let may = |action| allowed(&caller, Space::of(&name), owner.as_ref(), action);
                let flags: String = Action::ALL
                    .iter()
                    .zip("rwd".chars())
                    .map(|(action, flag)| if may(*action) { flag } else { '-' })
                    .collect();
                assert_eq!(flags, *expected, "{name} of {owner:?} as {role:?}");
            }
        }
    }
}
