//! Whether the vsock device is one that serves all of a VM's connections.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// A program that only says its version has long said it by then.
const PATIENCE: Duration = Duration::from_secs(5);

/// What an operator should know about this device, if anything.
pub async fn warning(program: &Path) -> Option<String> {
    let asked = Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(PATIENCE, asked).await.ok()?.ok()?;
    judge(&String::from_utf8_lossy(&output.stdout))
}

/// Releases up to 0.3 stop handing out packets at a connection that has none, whoever waits behind it (until Kiln's
/// first patch), and keep what a VM sends while there is something for it that it has no room for (until its second).
fn judge(said: &str) -> Option<String> {
    let version = said.split_whitespace().nth(1)?;
    let has_fault = ["0.1.", "0.2.", "0.3."].iter().any(|old| version.starts_with(old));
    let patched = version.contains("+kiln") && !version.ends_with("+kiln.1");
    (has_fault && !patched).then(|| {
        format!(
            "vhost-device-vsock {version} can leave a VM's connection waiting for ever, which looks like a hung build: \
             install it with scripts/patches/vhost-device-vsock-0.3.0.patch, as scripts/quickstart does"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_with_the_fault_are_named() {
        for faulty in ["0.1.0", "0.2.0", "0.3.0", "0.3.0+kiln.1"] {
            let warning = judge(&format!("vhost-device-vsock {faulty}\n")).unwrap_or_default();
            assert!(warning.contains(faulty), "{faulty}: {warning}");
        }
        for sound in ["vhost-device-vsock 0.3.0+kiln.2", "vhost-device-vsock 0.4.0", "what?", ""] {
            assert_eq!(judge(sound), None, "{sound}");
        }
    }

    #[tokio::test]
    async fn a_program_that_says_nothing_is_not_judged() {
        assert_eq!(warning(Path::new("/bin/true")).await, None);
        assert_eq!(warning(Path::new("/nonexistent")).await, None);
    }
}
