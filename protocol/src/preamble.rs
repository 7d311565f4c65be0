//! The first bytes of the connections that are not control: a fixed 40 bytes, not postcard, so
//! that they are read without a decoder.
//!
//! | bytes | |
//! |---|---|
//! | 0–3 | `KLNP` |
//! | 4 | preamble version, 1 |
//! | 5 | [`Channel`] |
//! | 6–7 | egress: the number of the step that connects, big-endian; 0 where that is not known. Zero otherwise |
//! | 8–39 | the VM's nonce, from Welcome |
//!
//! A process that only reached the socket does not know the nonce and gets nothing.

use std::num::NonZeroU16;

use crate::hello::TOKEN_LEN;

/// Length of a preamble in bytes.
pub const LEN: usize = 8 + TOKEN_LEN;

const MAGIC: [u8; 4] = *b"KLNP";
const VERSION: u8 = 1;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Channel {
    /// HTTP of the distribution API.
    Registry = 1,
    /// HTTP of a forward proxy.
    Egress = 2,
    /// A session in the guest.
    Exec = 3,
}

/// A parsed preamble. The receiver compares the nonce, in constant time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What the connection is for.
    pub channel: Channel,
    /// The step that connects, where it is egress and known: what the guest says.
    pub step: Option<NonZeroU16>,
    /// The nonce that the sender shows.
    pub nonce: [u8; TOKEN_LEN],
}

/// Bytes that are not a preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection does not start with a preamble of this protocol")]
pub struct NotAPreamble;

impl Preamble {
    /// One of no step.
    pub fn new(channel: Channel, nonce: [u8; TOKEN_LEN]) -> Self {
        Self { channel, step: None, nonce }
    }

    /// The same, of a step. A number that does not fit is left out.
    #[must_use]
    pub fn of_step(mut self, step: Option<u32>) -> Self {
        let number = step.and_then(|step| u16::try_from(step).ok());
        self.step = number.and_then(NonZeroU16::new);
        self
    }

    /// The bytes to send.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = self.channel as u8;
        bytes[6..8].copy_from_slice(&self.step.map_or(0, NonZeroU16::get).to_be_bytes());
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    /// Reads the bytes of a preamble.
    pub fn decode(bytes: &[u8; LEN]) -> Result<Self, NotAPreamble> {
        let (head, nonce) = bytes.split_at(8);
        let [b'K', b'L', b'N', b'P', VERSION, channel, high, low] = head else {
            return Err(NotAPreamble);
        };
        let channel = match *channel {
            1 => Channel::Registry,
            2 => Channel::Egress,
            3 => Channel::Exec,
            _ => return Err(NotAPreamble),
        };
        let step = NonZeroU16::new(u16::from_be_bytes([*high, *low]));
        if step.is_some() && channel != Channel::Egress {
            return Err(NotAPreamble);
        }
        let nonce = nonce.try_into().map_err(|_| NotAPreamble)?;
        Ok(Self { channel, step, nonce })
    }
}

impl std::fmt::Debug for Preamble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Preamble")
            .field("channel", &self.channel)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        for channel in [Channel::Registry, Channel::Egress, Channel::Exec] {
            let preamble = Preamble::new(channel, [7; TOKEN_LEN]);
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
    }

    #[test]
    fn every_byte_of_the_head_counts() {
        let good = Preamble::new(Channel::Registry, [7; TOKEN_LEN]).encode();
        for at in 0..8 {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert_eq!(Preamble::decode(&bad), Err(NotAPreamble), "byte {at}");
        }
    }

    #[test]
    fn a_step_is_told_of_egress_and_where_it_fits() {
        let egress = Preamble::new(Channel::Egress, [7; TOKEN_LEN]);
        for (step, told) in
            [(Some(1), Some(1)), (Some(0xffff), Some(0xffff)), (Some(0x1_0000), None), (None, None)]
        {
            let preamble = egress.of_step(step);
            assert_eq!(preamble.step.map(NonZeroU16::get), told);
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
    }
}
