//! A step's name: its command as its author knows it.

use kiln_protocol::event::cut_text;

/// The name of a command. A shell that the engine put in front is left out; of a script that has
/// more than one line the first one stands for all.
pub fn step_name(args: &[String]) -> String {
    let text = match args {
        [shell, .., flag, script] if is_shell(shell) && is_command_flag(flag) => first_line(script),
        _ => args.iter().map(|arg| quoted(arg)).collect::<Vec<_>>().join(" "),
    };
    cut_text(&text)
}

/// The shells that a `SHELL` instruction usually names. `/bin/sh -c` is the default.
fn is_shell(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    ["sh", "bash", "ash", "dash", "zsh", "ksh"].contains(&name)
}

/// `-c`, also bundled with others, as in `bash -ec`.
fn is_command_flag(flag: &str) -> bool {
    flag.strip_prefix('-').is_some_and(|letters| {
        letters.ends_with('c') && letters.bytes().all(|b| b.is_ascii_alphabetic())
    })
}

fn first_line(script: &str) -> String {
    let mut lines = script.lines().map(str::trim).filter(|line| !line.is_empty());
    match (lines.next(), lines.next()) {
        (None, _) => String::new(),
        (Some(only), None) => only.to_owned(),
        (Some(first), Some(_)) => format!("{first} …"),
    }
}

/// An argument of the exec form; quoted where the words would otherwise run together.
fn quoted(arg: &str) -> String {
    let plain =
        !arg.is_empty() && !arg.contains(|c: char| c.is_whitespace() || "\"'\\".contains(c));
    if plain { arg.to_owned() } else { format!("{arg:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::event::MAX_REPORT_TEXT;

    fn name(args: &[&str]) -> String {
        step_name(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
    }

    /// The argument lists are what buildah 1.39.3 hands over.
    #[test]
    fn commands_are_named_as_their_author_knows_them() {
        assert_eq!(name(&["/bin/sh", "-c", "echo one && echo two"]), "echo one && echo two");
        assert_eq!(name(&["/bin/sh", "exec", "form"]), "/bin/sh exec form");
        assert_eq!(name(&["/bin/bash", "-o", "pipefail", "-c", "make"]), "make");
        assert_eq!(name(&["bash", "-euxc", "make"]), "make");
        assert_eq!(name(&["/bin/sh", "-c", "\nline one\nline two"]), "line one …");
        assert_eq!(name(&["python3", "-c", "print(1)"]), "python3 -c print(1)");
        assert_eq!(name(&["echo", "two words", ""]), "echo \"two words\" \"\"");
        assert_eq!(name(&["/bin/sh", "-c", " "]), "");
        assert_eq!(name(&[]), "");
    }

    #[test]
    fn a_long_command_is_cut() {
        let long = "x".repeat(MAX_REPORT_TEXT);
        assert_eq!(name(&["/bin/sh", "-c", &long]), long);
        assert!(name(&["/bin/sh", "-c", &format!("{long}y")]).ends_with('…'));
    }
}
