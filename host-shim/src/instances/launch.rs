//! What an instance's program is: the image's config, and what the user wants instead. Pure.
//!
//! The rules are those of other container tools: another entrypoint drops the image's command with the image's
//! entrypoint; another command goes to the image's entrypoint; variables are replaced by name.

use std::collections::HashMap;

use kiln_protocol::job::JobTooLarge;
use kiln_protocol::run::RunJob;
use nix::sys::signal::Signal;
use serde::Deserialize;

/// What the user wants of an instance's program, beside its image.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Instead of the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Instead of the image's command.
    pub cmd: Option<Vec<String>>,
    /// Variables, beside and instead of the image's.
    pub env: Vec<(String, String)>,
}

/// The parts of an image's config (OCI image spec, "Properties") that a program is made from. All of it
/// is the image's word; Docker's tools write `null` where they mean nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ImageConfig {
    /// `name`, `uid`, either with `:group`.
    pub user: Option<String>,
    /// `NAME=VALUE`.
    pub env: Option<Vec<String>>,
    /// The beginning of the command line.
    pub entrypoint: Option<Vec<String>>,
    /// The rest of it.
    pub cmd: Option<Vec<String>>,
    /// Absolute, as builders write it.
    pub working_dir: Option<String>,
    /// `SIGTERM`, `TERM` or `15`.
    pub stop_signal: Option<String>,
}

/// Why there is no program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoProgram {
    /// Neither the image nor the user names one.
    #[error("the image names no command; give one")]
    NoCommand,
    /// A zero byte ends every text for the kernel.
    #[error("a word of the command, or a variable, holds a zero byte")]
    Zero,
    /// It would not get into the VM.
    #[error(transparent)]
    TooLarge(#[from] JobTooLarge),
}

/// The job of an instance.
pub fn job(name: &str, image: &ImageConfig, wanted: &Wanted) -> Result<RunJob, NoProgram> {
    let entrypoint = wanted.entrypoint.as_ref().or(image.entrypoint.as_ref());
    let image_cmd = if wanted.entrypoint.is_some() { None } else { image.cmd.as_ref() };
    let cmd = wanted.cmd.as_ref().or(image_cmd);
    let args: Vec<String> = entrypoint.into_iter().chain(cmd).flatten().cloned().collect();
    if args.first().is_none_or(String::is_empty) {
        return Err(NoProgram::NoCommand);
    }
    let job = RunJob {
        hostname: name.to_owned(),
        args,
        env: environment(image, wanted),
        user: image.user.clone().unwrap_or_default(),
        working_dir: absolute(image.working_dir.as_deref().unwrap_or_default()),
        stop_signal: stop_signal(image.stop_signal.as_deref().unwrap_or_default()),
    };
    let texts = job.args.iter().chain(job.env.iter().flat_map(|(name, value)| [name, value]));
    if texts.chain([&job.user, &job.working_dir]).any(|text| text.contains('\0')) {
        return Err(NoProgram::Zero);
    }
    job.check()?;
    Ok(job)
}

/// The image's variables in order, each name once, then the user's that are new.
fn environment(image: &ImageConfig, wanted: &Wanted) -> Vec<(String, String)> {
    let given = image.env.iter().flatten().filter_map(|entry| entry.split_once('='));
    let given = given.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut env: Vec<(String, String)> = vec![];
    let mut places = HashMap::new();
    for (name, value) in
        given.chain(wanted.env.iter().cloned()).filter(|(name, _)| !name.is_empty())
    {
        if let Some(place) = places.get(&name) {
            let (_, known): &mut (String, String) = &mut env[*place];
            *known = value;
        } else {
            places.insert(name.clone(), env.len());
            env.push((name, value));
        }
    }
    env
}

/// The path without `.` and `..`, from the root on.
fn absolute(path: &str) -> String {
    let mut parts = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// The signal's number; SIGTERM for one that has no name, the real-time ones among them.
fn stop_signal(text: &str) -> u8 {
    let upper = text.to_ascii_uppercase();
    let named = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let numbered = text.parse().ok().and_then(|number: i32| Signal::try_from(number).ok());
    let signal = named.parse().ok().or(numbered).unwrap_or(Signal::SIGTERM);
    u8::try_from(signal as i32).unwrap_or(15)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::run::MAX_ARGS;

    use super::*;

    #[expect(clippy::unnecessary_wraps, reason = "stands for what may be missing")]
    fn words(text: &str) -> Option<Vec<String>> {
        Some(text.split_whitespace().map(str::to_owned).collect())
    }

    fn args(image: (&str, &str), entrypoint: Option<&str>, cmd: Option<&str>) -> String {
        let image =
            ImageConfig { entrypoint: words(image.0), cmd: words(image.1), ..Default::default() };
        let wanted = Wanted {
            entrypoint: entrypoint.and_then(words),
            cmd: cmd.and_then(words),
            env: vec![],
        };
        job("n", &image, &wanted).map_or_else(|e| e.to_string(), |job| job.args.join(" "))
    }

    #[test]
    fn entrypoint_and_command_are_put_together_as_elsewhere() {
        let image = ("/entry --x", "serve all");
        assert_eq!(args(image, None, None), "/entry --x serve all");
        assert_eq!(args(image, None, Some("other")), "/entry --x other");
        assert_eq!(args(image, Some("/bin/sh"), None), "/bin/sh");
        assert_eq!(args(image, Some("/bin/sh"), Some("-c id")), "/bin/sh -c id");
        assert_eq!(args(image, Some(""), Some("id")), "id", "an empty entrypoint is none");
        assert_eq!(args(("", "serve"), None, None), "serve");
        for nothing in [args(("", ""), None, None), args(image, Some(""), None)] {
            assert_eq!(nothing, "the image names no command; give one");
        }
    }

    #[test]
    fn variables_are_replaced_by_name_in_their_place() {
        let image = ImageConfig {
            env: words("A=1 B=2=3 A=4 broken =x"),
            cmd: words("c"),
            ..Default::default()
        };
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let wanted = Wanted { env: vec![pair("B", "new"), pair("C", "")], ..Default::default() };
        let env = job("n", &image, &wanted).unwrap().env;
        assert_eq!(env, [pair("A", "4"), pair("B", "new"), pair("C", "")]);
    }

    #[test]
    fn directories_are_absolute_and_signals_have_numbers() {
        for (given, expected) in
            [("", "/"), ("/", "/"), ("/srv/", "/srv"), ("a/../b//c/.", "/b/c"), ("../../x", "/x")]
        {
            assert_eq!(absolute(given), expected);
        }
        for (given, expected) in [
            ("", 15),
            ("SIGQUIT", 3),
            ("quit", 3),
            ("9", 9),
            ("SIGRTMIN+3", 15),
            ("37", 15),
            ("0", 15),
            ("nonsense", 15),
        ] {
            assert_eq!(stop_signal(given), expected, "{given}");
        }
    }

    #[test]
    fn a_config_is_read_as_builders_write_it() {
        let text =
            r#"{"User":"app","Env":null,"Entrypoint":null,"Cmd":["/bin/sh"],"Labels":{"a":"b"}}"#;
        let config: ImageConfig = serde_json::from_str(text).unwrap();
        assert_eq!(job("n", &config, &Wanted::default()).unwrap().user, "app");
    }

    #[test]
    fn what_the_kernel_or_the_protocol_cannot_take_is_refused() {
        let zero = Wanted { cmd: Some(vec!["a\0b".into()]), ..Default::default() };
        assert_eq!(job("n", &ImageConfig::default(), &zero), Err(NoProgram::Zero));
        let many = |n| Wanted { cmd: Some(vec!["a".into(); n]), ..Default::default() };
        assert!(job("n", &ImageConfig::default(), &many(MAX_ARGS)).is_ok());
        let refused = job("n", &ImageConfig::default(), &many(MAX_ARGS + 1));
        assert!(matches!(refused, Err(NoProgram::TooLarge(_))));
    }
}
