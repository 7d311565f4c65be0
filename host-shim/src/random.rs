//! Random bytes that nobody can guess, for tokens, nonces and ids.

use aws_lc_rs::rand;

/// `N` random bytes from the operating system's generator.
///
/// # Panics
/// When the generator fails, which it does not do on Linux once booted: there is no safe way on.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[allow(clippy::expect_used, reason = "nothing that needs secrets can go on without them")]
    rand::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}
