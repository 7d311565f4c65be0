//! An error with its causes, for the log: their `Display` leaves them out.

/// All of them in one line, the outermost first.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read the file")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn every_cause_is_named_once() {
        let error = Outer(std::io::Error::other("the disk is gone"));
        assert_eq!(chain(&error), "cannot read the file: the disk is gone");
        assert_eq!(chain(&std::io::Error::other("alone")), "alone");
    }
}
