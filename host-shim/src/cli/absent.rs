//! A Dockerfile of `-f` that is not there. Pure.
//!
//! The build finds it out, not the client: it is sent a source without any, and knows no other name than `Dockerfile`.
//! What it says of that is told by the name that the user gave.

use std::path::Path;

use super::follow::Received;
use super::view::{BuildView, EventView};

/// The failure's kind.
const MISSING: &str = "dockerfile_missing";

/// What is told of it.
pub fn not_there(dockerfile: &Path) -> String {
    format!(
        "the Dockerfile {} does not exist; -f is relative to the current directory, not to the source",
        dockerfile.display()
    )
}

/// The build's failure by that name, where it is this one. The server's own bytes stay as they are.
pub fn named_in_event(received: &Received, dockerfile: &Path) -> Option<Received> {
    let EventView::Failure { kind, .. } = &received.event else { return None };
    (kind == MISSING).then(|| Received {
        data: received.data.clone(),
        event: EventView::Failure { kind: kind.clone(), message: not_there(dockerfile) },
    })
}

/// The same of the build that has ended.
pub fn named_in_build(mut build: BuildView, dockerfile: &Path) -> BuildView {
    if let Some(failure) = build.failure.as_mut().filter(|failure| failure.kind == MISSING) {
        failure.message = not_there(dockerfile);
        build.error = Some(failure.message.clone());
    }
    build
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_this_failure_is_told_by_its_name() {
        let path = Path::new("app/Other");
        let failed = |kind| {
            let failure = json!({"kind": kind, "message": "the Dockerfile `Dockerfile` is not in the source"});
            let build = json!({"id": "b1", "status": "failed", "error": failure["message"], "failure": failure});
            named_in_build(BuildView::of(&build).unwrap(), path).verdict().unwrap_err().message
        };
        let named = format!("build b1 failed: {}", not_there(path));
        assert_eq!(failed(MISSING), named);
        assert!(named.contains("the Dockerfile app/Other does not exist"), "{named}");
        assert!(failed("dockerfile_invalid").contains("`Dockerfile`"));

        let event = |kind: &str| Received {
            data: "{}".into(),
            event: EventView::Failure { kind: kind.into(), message: "m".into() },
        };
        let told = named_in_event(&event(MISSING), path).unwrap();
        let expected = EventView::Failure { kind: MISSING.into(), message: not_there(path) };
        assert_eq!((told.event, told.data), (expected, "{}".to_owned()));
        assert_eq!(named_in_event(&event("pull_failed"), path), None);
    }
}
