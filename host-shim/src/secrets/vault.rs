//! Sealing and opening, by AES-256-GCM with random nonces. Pure apart from those.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::hmac::{self, HMAC_SHA256};
use kiln_protocol::secret::SecretValue;

use crate::build::{BuildId, Tenant};

/// The layout of what is sealed: this byte, the nonce, then the ciphertext with its tag.
const LAYOUT: u8 = 1;

/// Whose a secret is. A sealed value opens for the same owner and id only.
#[derive(Clone, Copy, Debug)]
pub enum Owner<'a> {
    /// Of a tenant, until it is removed.
    Tenant(&'a Tenant),
    /// Of a build alone, until it ends.
    Build(&'a BuildId),
}

/// A value as it is stored.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed(pub Vec<u8>);

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.0.len())
    }
}

/// Why a value is not sealed, or does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// The cryptography library refuses, or the system gives no random bytes.
    #[error("secrets cannot be sealed on this host: its cryptography library refuses")]
    Unusable,
    /// Another key, another owner, or damaged.
    #[error(
        "the secret {0} does not open: the host's key file is another one than when it was stored; set it again"
    )]
    DoesNotOpen(&'static str),
}

/// Holds the key.
pub struct Vault {
    key: RandomizedNonceKey,
    /// Of fingerprints. Another key: nothing is known of two uses of one.
    mac: hmac::Key,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vault(..)")
    }
}

impl Vault {
    /// With a key of 256 bits.
    pub fn new(raw: &[u8; 32]) -> Result<Self, VaultError> {
        let key = RandomizedNonceKey::new(&AES_256_GCM, raw).map_err(|_| VaultError::Unusable)?;
        let derived = hmac::sign(&hmac::Key::new(HMAC_SHA256, raw), b"kiln secret fingerprints v1");
        Ok(Self { key, mac: hmac::Key::new(HMAC_SHA256, derived.as_ref()) })
    }

    /// Seals a value.
    pub fn seal(&self, owner: Owner<'_>, id: &str, value: Vec<u8>) -> Result<Sealed, VaultError> {
        let mut text = value;
        let nonce = self
            .key
            .seal_in_place_append_tag(Aad::from(bound_to(owner, id)), &mut text)
            .map_err(|_| VaultError::Unusable)?;
        let mut sealed = Vec::with_capacity(1 + NONCE_LEN + text.len());
        sealed.push(LAYOUT);
        sealed.extend_from_slice(nonce.as_ref());
        sealed.extend_from_slice(&text);
        Ok(Sealed(sealed))
    }

    /// Tells values apart without telling anything about them to who has no key.
    pub fn fingerprint<'a>(&self, values: impl Iterator<Item = (&'a str, &'a [u8])>) -> [u8; 32] {
        let mut mac = hmac::Context::with_key(&self.mac);
        for part in values.flat_map(|(id, value)| [id.as_bytes(), value]) {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(mac.sign().as_ref());
        fingerprint
    }

    /// Opens what was sealed for the same owner and id.
    pub fn open(
        &self,
        owner: Owner<'_>,
        id: &str,
        sealed: &Sealed,
    ) -> Result<SecretValue, VaultError> {
        let closed = VaultError::DoesNotOpen(match owner {
            Owner::Tenant(_) => "of the tenant",
            Owner::Build(_) => "of the build",
        });
        let rest = sealed.0.strip_prefix(&[LAYOUT]).ok_or(closed)?;
        let (nonce, text) = rest.split_at_checked(NONCE_LEN).ok_or(closed)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| closed)?;
        let mut text = text.to_vec();
        let aad = Aad::from(bound_to(owner, id));
        let length = self.key.open_in_place(nonce, aad, &mut text).map_err(|_| closed)?.len();
        text.truncate(length);
        Ok(SecretValue::new(text))
    }
}

/// What a sealed value is bound to. An owner's name holds no NUL.
fn bound_to(owner: Owner<'_>, id: &str) -> Vec<u8> {
    let (kind, name) = match owner {
        Owner::Tenant(tenant) => ("tenant", tenant.as_str()),
        Owner::Build(build) => ("build", build.as_str()),
    };
    format!("{kind}\0{name}\0{id}").into_bytes()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_for_its_owner_and_id_alone() {
        let vault = Vault::new(&[7; 32]).unwrap();
        let (a, b) = (Tenant::new("a").unwrap(), Tenant::new("b").unwrap());
        let build = BuildId::new("a").unwrap();
        for value in [&b""[..], b" \n\0\xff", &vec![9; 512 * 1024]] {
            let sealed = vault.seal(Owner::Tenant(&a), "npm", value.to_vec()).unwrap();
            let open = |owner, id: &str| vault.open(owner, id, &sealed);
            assert_eq!(open(Owner::Tenant(&a), "npm").unwrap().expose(), value);
            open(Owner::Tenant(&b), "npm").unwrap_err();
            open(Owner::Tenant(&a), "pip").unwrap_err();
            open(Owner::Build(&build), "npm").unwrap_err();
        }
    }

    #[test]
    fn fingerprints_tell_values_ids_and_keys_apart() {
        let vault = Vault::new(&[7; 32]).unwrap();
        let of = |vault: &Vault, pairs: &[(&str, &[u8])]| vault.fingerprint(pairs.iter().copied());
        let one = of(&vault, &[("a", b"bc")]);
        assert_eq!(one, of(&Vault::new(&[7; 32]).unwrap(), &[("a", b"bc")]));
        for other in [
            of(&vault, &[("ab", b"c")]),
            of(&vault, &[("a", b"bd")]),
            of(&Vault::new(&[8; 32]).unwrap(), &[("a", b"bc")]),
        ] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn the_same_value_is_never_sealed_the_same_and_no_bit_may_change() {
        let vault = Vault::new(&[7; 32]).unwrap();
        let a = Tenant::new("a").unwrap();
        let owner = Owner::Tenant(&a);
        let sealed = vault.seal(owner, "npm", b"hunter2hunter2".to_vec()).unwrap();
        assert_ne!(sealed, vault.seal(owner, "npm", b"hunter2hunter2".to_vec()).unwrap());
        assert!(!sealed.0.windows(7).any(|window| window == b"hunter2"));
        for at in 0..sealed.0.len() {
            let mut other = sealed.clone();
            other.0[at] ^= 1;
            vault.open(owner, "npm", &other).unwrap_err();
        }
        for length in 0..sealed.0.len() {
            vault.open(owner, "npm", &Sealed(sealed.0[..length].to_vec())).unwrap_err();
        }
        Vault::new(&[8; 32]).unwrap().open(owner, "npm", &sealed).unwrap_err();
    }
}
