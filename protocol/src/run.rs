//! The job of an instance: the program of an image, started as the image and its user want it.

use serde::{Deserialize, Serialize};

use crate::job::{JobTooLarge, MAX_JOB_TEXT, at_most};

/// Most words of a command line.
pub const MAX_ARGS: usize = 4096;
/// Most variables of an environment.
pub const MAX_ENV: usize = 4096;
/// Most bytes of all words together, and of all variables together. Linux itself takes 2 MiB of both.
pub const MAX_RUN_BYTES: usize = 256 * 1024;
/// Longest path of a working directory: Linux' `PATH_MAX` with its zero.
pub const MAX_DIRECTORY: usize = 4095;
/// Longest `user` or `user:group`.
pub const MAX_USER: usize = 512;
/// Longest host name: one label of a domain name.
pub const MAX_HOSTNAME: usize = 63;

/// A program to run in the image on the VM's third disk.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunJob {
    /// What the VM calls itself.
    pub hostname: String,
    /// The program and its arguments. The program is looked for along `PATH` when it has no slash.
    pub args: Vec<String>,
    /// The environment, each name once.
    pub env: Vec<(String, String)>,
    /// As an image's config has it: empty, or `user` or `user:group`, each a name or a number.
    pub user: String,
    /// Absolute; made where it is missing.
    pub working_dir: String,
    /// The number of the signal that asks the program to end.
    pub stop_signal: u8,
}

// An environment is where people put passwords.
impl std::fmt::Debug for RunJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunJob")
            .field("hostname", &self.hostname)
            .field("args", &format_args!("{} of them", self.args.len()))
            .field("env", &format_args!("{} of them", self.env.len()))
            .field("user", &self.user)
            .field("working_dir", &self.working_dir)
            .field("stop_signal", &self.stop_signal)
            .finish()
    }
}

impl RunJob {
    /// Whether every bound holds.
    pub fn check(&self) -> Result<(), JobTooLarge> {
        at_most("hostname", self.hostname.len(), MAX_HOSTNAME)?;
        at_most("user", self.user.len(), MAX_USER)?;
        at_most("working directory", self.working_dir.len(), MAX_DIRECTORY)?;
        at_most("args count", self.args.len(), MAX_ARGS)?;
        let mut total = 0;
        for word in &self.args {
            at_most("argument", word.len(), MAX_JOB_TEXT)?;
            total += word.len();
        }
        at_most("args", total, MAX_RUN_BYTES)?;
        at_most("env count", self.env.len(), MAX_ENV)?;
        let mut total = 0;
        for (name, value) in &self.env {
            at_most("variable", name.len().max(value.len()), MAX_JOB_TEXT)?;
            total += name.len() + value.len();
        }
        at_most("env", total, MAX_RUN_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> RunJob {
        RunJob {
            hostname: "h".into(),
            args: vec!["/app".into()],
            env: vec![("K".into(), "V".into())],
            user: String::new(),
            working_dir: "/".into(),
            stop_signal: 15,
        }
    }

    fn check(run: &RunJob) -> Option<&'static str> {
        run.check().err().map(|e| e.field)
    }

    #[test]
    fn every_bound_holds_at_and_breaks_above() {
        type Change = fn(&mut RunJob, usize);
        let bounds: [(&str, usize, Change); 9] = [
            ("hostname", MAX_HOSTNAME, |r, n| r.hostname = "h".repeat(n)),
            ("user", MAX_USER, |r, n| r.user = "u".repeat(n)),
            ("working directory", MAX_DIRECTORY, |r, n| r.working_dir = "/".repeat(n)),
            ("args count", MAX_ARGS, |r, n| r.args = vec!["a".into(); n]),
            ("argument", MAX_JOB_TEXT, |r, n| r.args = vec!["a".repeat(n)]),
            ("args", MAX_RUN_BYTES, |r, n| {
                r.args = vec!["a".repeat(MAX_JOB_TEXT); n / MAX_JOB_TEXT];
                r.args.push("a".repeat(n % MAX_JOB_TEXT));
            }),
            ("env count", MAX_ENV, |r, n| r.env = vec![("k".into(), "v".into()); n]),
            ("variable", MAX_JOB_TEXT, |r, n| r.env = vec![("k".into(), "v".repeat(n))]),
            ("env", MAX_RUN_BYTES, |r, n| {
                r.env = vec![(String::new(), "v".repeat(MAX_JOB_TEXT)); n / MAX_JOB_TEXT];
                r.env.push(("k".repeat(n % MAX_JOB_TEXT), String::new()));
            }),
        ];
        for (field, limit, change) in bounds {
            let mut at = run();
            change(&mut at, limit);
            assert_eq!(check(&at), None, "{field} at its bound");
            let mut above = run();
            change(&mut above, limit + 1);
            assert_eq!(check(&above), Some(field));
        }
    }

    #[test]
    fn words_and_variables_are_not_in_debug_output() {
        let mut job = run();
        job.args.push("hunter2".into());
        job.env.push(("PASSWORD".into(), "hunter2".into()));
        let shown = format!("{job:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("PASSWORD"), "{shown}");
    }
}
