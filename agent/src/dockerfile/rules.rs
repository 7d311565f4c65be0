//! What the engine lacks or does in another way, by instruction and flag. Pure.
//!
//! Every flag of Docker's reference is here: as one that the engine has, as one to rewrite, or as one
//! to refuse. Others are refused too, for the engine passes over some in silence.

use std::borrow::Cow;
use std::ops::Range;

use super::words::{Flag, Words};
use super::{secret_mount, variables};

/// What to do about an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The engine does it.
    Keep,
    /// The engine does it once these parts of the instruction read like this.
    Change(Vec<Edit>),
    /// A `COPY --parents`.
    Parents,
    /// What is not supported, and what to do instead.
    Refuse(String),
}

/// A part of an instruction's one line, and what it is to be.
pub type Edit = (Range<usize>, String);

/// Every instruction of Docker's reference.
const INSTRUCTIONS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Those in whose arguments Docker puts variables itself; in the others a shell does.
const EXPANDED: [&str; 12] = [
    "ADD",
    "ARG",
    "COPY",
    "ENV",
    "EXPOSE",
    "FROM",
    "LABEL",
    "ONBUILD",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Those whose arguments are names with values.
const NAMES: [&str; 3] = ["ARG", "ENV", "LABEL"];

/// The rule for an instruction, which may be that of an `ONBUILD`.
pub fn rule(words: &Words<'_>, onbuild: bool) -> Rule {
    let keyword = words.keyword.as_str();
    if !INSTRUCTIONS.contains(&keyword) {
        return Rule::Refuse(format!("unknown instruction {keyword}"));
    }
    if EXPANDED.contains(&keyword)
        && let Some(expression) = variables::unsupported(words.rest)
    {
        return Rule::Refuse(format!(
            "{keyword}: {expression} is not supported, only ${{name:-word}}, ${{name:+word}} and patterns"
        ));
    }
    if NAMES.contains(&keyword) && words.rest.starts_with('=')
        || keyword == "ARG" && words.rest.is_empty()
    {
        return Rule::Refuse(format!("{keyword} without a name"));
    }
    if keyword == "EXPOSE" {
        return expose(words);
    }
    let known: &[&str] = match keyword {
        "COPY" => &["from", "chown", "chmod", "link", "parents", "exclude"],
        "ADD" => &["chown", "chmod", "checksum", "link", "exclude", "keep-git-dir", "unpack"],
        "RUN" => &["mount", "network", "security", "device"],
        "FROM" => &["platform"],
        "HEALTHCHECK" => &["interval", "timeout", "start-period", "start-interval", "retries"],
        // The others have none; the engine says so.
        _ => return Rule::Keep,
    };
    if let Some(flag) = words.flags.iter().find(|flag| !known.contains(&flag.name.as_str())) {
        return Rule::Refuse(format!("{keyword} --{} is not known", flag.name));
    }
    for flag in &words.flags {
        if !flag.value.as_deref().unwrap_or_default().is_ascii() {
            return Rule::Refuse(format!("{keyword} --{}: only ASCII characters", flag.name));
        }
        if let Some(why) = refused(keyword, flag) {
            return Rule::Refuse(why);
        }
    }
    if ["ADD", "COPY"].contains(&keyword)
        && serde_json::from_str(words.rest)
            .is_ok_and(|list: Vec<String>| list.iter().any(|name| name.contains('"')))
    {
        return Rule::Refuse(format!(
            "{keyword}: a name with `\"` in a JSON list is not supported: rename it"
        ));
    }
    if keyword == "ADD"
        && let Some(address) =
            words.arguments().iter().rev().skip(1).find(|source| is_address(source))
        && !is_git(address)
    {
        return Rule::Refuse(format!(
            "ADD of an address ({address}) is not supported yet: fetch it in a RUN, which has the proxy"
        ));
    }
    if keyword == "ADD"
        && let Some(git) = words.arguments().iter().rev().skip(1).find(|source| is_git(source))
    {
        return Rule::Refuse(format!(
            "ADD of a Git repository ({git}) is not supported: clone it in a RUN, or send it with the source"
        ));
    }
    if words.flags.iter().any(|flag| flag.name == "parents" && is_set(flag)) {
        if onbuild {
            return Rule::Refuse("ONBUILD COPY --parents is not supported".to_owned());
        }
        return Rule::Parents;
    }
    let edits: Vec<_> = words.flags.iter().filter_map(edit).collect();
    if edits.is_empty() { Rule::Keep } else { Rule::Change(edits) }
}

fn edit(flag: &Flag) -> Option<Edit> {
    if is_dropped(flag) {
        return Some((flag.range.clone(), String::new()));
    }
    let value = flag.value.as_deref().filter(|_| flag.name == "mount")?;
    let is_secret = value.split(',').any(|part| part.eq_ignore_ascii_case("type=secret"));
    if is_secret && let Ok(Some(flags)) = secret_mount::rewrite(value) {
        return Some((flag.range.clone(), flags));
    }
    let parts: Vec<_> = value.split(',').collect();
    let kind = parts.iter().find_map(|part| part.strip_prefix("type="))?;
    let renamed: Vec<_> = parts.iter().map(|part| in_buildahs_words(kind, part)).collect();
    (renamed != parts).then(|| (flag.range.clone(), format!("--mount={}", renamed.join(","))))
}

/// A part of a mount, where buildah has another word for what Docker calls it.
fn in_buildahs_words<'a>(kind: &str, part: &'a str) -> Cow<'a, str> {
    match (kind, part.split_once('=')) {
        ("tmpfs", Some(("size", size))) => format!("tmpfs-size={size}").into(),
        // The steps of a build run one after the other: nobody shares it at one time.
        ("cache", Some(("sharing", "private"))) => "sharing=locked".into(),
        _ => part.into(),
    }
}

/// A range of ports is each of them: the engine would take it for one of that name.
fn expose(words: &Words<'_>) -> Rule {
    let mut ports = Vec::new();
    for word in words.rest.split_whitespace() {
        let (range, protocol) =
            word.split_once('/').map_or((word, ""), |(range, _)| (range, &word[range.len()..]));
        let bounds =
            range.split_once('-').map(|(from, to)| (from.parse::<u16>(), to.parse::<u16>()));
        match bounds {
            None if !word.contains('$') && !is_port(range, protocol) => {
                return Rule::Refuse(format!(
                    "EXPOSE {word}: not a port from 0 to 65535, with or without /tcp, /udp or /sctp"
                ));
            }
            None => ports.push(word.to_owned()),
            // The dash of a default.
            Some(_) if word.contains('$') && !variables::removed(word).contains('-') => {
                ports.push(word.to_owned());
            }
            Some((Ok(from), Ok(to))) if from <= to && to - from < MAX_PORTS => {
                ports.extend((from..=to).map(|port| format!("{port}{protocol}")));
            }
            Some(_) => {
                return Rule::Refuse(format!(
                    "EXPOSE {word}: not a range of at most {MAX_PORTS} ports"
                ));
            }
        }
    }
    let list = ports.join(" ");
    if list == words.rest.split_whitespace().collect::<Vec<_>>().join(" ") {
        return Rule::Keep;
    }
    Rule::Change(vec![(words.rest_range(), list)])
}

fn is_port(port: &str, protocol: &str) -> bool {
    let known = ["", "/tcp", "/udp", "/sctp"];
    port.parse::<u16>().is_ok() && known.contains(&protocol.to_ascii_lowercase().as_str())
}

/// Nobody lists more by hand.
const MAX_PORTS: u16 = 1024;

/// Flags without which the result is the same but for what the note says.
pub fn is_dropped(flag: &Flag) -> bool {
    matches!(flag.name.as_str(), "link" | "parents" | "keep-git-dir" | "security" | "unpack")
}

/// Whether a flag that is true or false is true.
pub fn is_set(flag: &Flag) -> bool {
    !matches!(flag.value.as_deref(), Some("false" | "0"))
}

/// Why a flag that is known is refused.
fn refused(keyword: &str, flag: &Flag) -> Option<String> {
    let value = flag.value.as_deref().unwrap_or_default();
    let instead = match flag.name.as_str() {
        "exclude" => "exclude the files in .dockerignore, or remove them in a RUN",
        "keep-git-dir" if is_set(flag) => "do it in a RUN",
        // Set, it changes nothing for what is not fetched.
        "unpack" if !is_set(flag) => "COPY does not unpack",
        "checksum" => "check it in a RUN, with sha256sum",
        "chmod" if !is_octal(value) && !value.contains('$') => "give the mode as an octal number",
        "security" if value != "sandbox" => "steps have no more rights than the others",
        "device" => "a build's VM has no devices",
        "network" if value == "host" => {
            "steps have a network of their own: leave it out, or use --network=none"
        }
        "network" if !["default", "none"].contains(&value) => "use none or default",
        "mount" => return mount(value),
        _ => return None,
    };
    let given = flag.value.as_ref().map(|value| format!("={value}")).unwrap_or_default();
    Some(format!("{keyword} --{}{given} is not supported: {instead}", flag.name))
}

/// `type=secret,id=…`
fn mount(value: &str) -> Option<String> {
    let mut kind = "bind";
    for part in value.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        if key.contains('$') {
            return Some(format!("RUN --mount={part}: write out what it is"));
        }
        if key.eq_ignore_ascii_case("type") {
            kind = value;
        }
    }
    match kind {
        "ssh" => Some("RUN --mount=type=ssh is not supported: use a secret".to_owned()),
        "secret" => secret_mount::rewrite(value).err(),
        "bind" | "cache" | "tmpfs" => None,
        other => Some(format!("RUN --mount=type={other} is not known")),
    }
}

fn is_octal(mode: &str) -> bool {
    (1..=5).contains(&mode.len()) && mode.bytes().all(|digit| (b'0'..=b'7').contains(&digit))
}

fn is_address(source: &str) -> bool {
    let lower = source.to_ascii_lowercase();
    lower.starts_with("http://") || lower.starts_with("https://")
}

/// Docker's rules for what is a Git repository (docs.docker.com/reference/dockerfile, *ADD*).
fn is_git(source: &str) -> bool {
    let lower = source.to_ascii_lowercase();
    let (path, _) = lower.split_once(['#', '?']).unwrap_or((&lower, ""));
    let web = path.starts_with("http://") || path.starts_with("https://");
    path.starts_with("git://")
        || path.starts_with("ssh://")
        || path.starts_with("git@")
        || path.starts_with("github.com/")
        || web && path.strip_suffix(".git").is_some()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn of(line: &str) -> Rule {
        let instruction = scan(line).unwrap().instructions.remove(0);
        rule(&Words::of(&instruction), false)
    }

    fn refusal(line: &str) -> String {
        match of(line) {
            Rule::Refuse(why) => why,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn what_the_engine_has_is_kept() {
        for line in [
            "FROM --platform=$BUILDPLATFORM x",
            "COPY --from=a --chown=b --chmod=0644 a /b",
            "COPY --chmod=$MODE a /b",
            "RUN --mount=type=cache,target=/c --mount=target=/d --network=none true",
            "RUN --mount=type=secret,id=x cat /run/secrets/x",
            "HEALTHCHECK --interval=5s --start-interval=1s CMD true",
            "ENV a=--b",
            "RUN --network=default a --exclude",
        ] {
            assert_eq!(of(line), Rule::Keep, "{line}");
        }
    }

    #[test]
    fn what_changes_nothing_goes() {
        for line in [
            "COPY --link a /b",
            "COPY --link=false a /b",
            "ADD --link --chown=1 a /b",
            "RUN --security=sandbox true",
            "ADD --unpack a.tar /b",
            "ADD --keep-git-dir=false a /b",
            "COPY --parents=false a /b",
        ] {
            let Rule::Change(flags) = of(line) else { panic!("{line}") };
            assert_eq!(flags.len(), 1, "{line}");
        }
        assert_eq!(of("COPY --parents --link a /b"), Rule::Parents);
    }

    #[test]
    fn what_the_engine_calls_otherwise_is_renamed() {
        let change = |line| match of(line) {
            Rule::Change(edits) => edits.into_iter().next().unwrap().1,
            other => panic!("{line}: {other:?}"),
        };
        let tmpfs = "RUN --mount=type=tmpfs,target=/t,size=1048576 true";
        assert_eq!(change(tmpfs), "--mount=type=tmpfs,target=/t,tmpfs-size=1048576");
        assert_eq!(of("RUN --mount=type=tmpfs,target=/t true"), Rule::Keep);
        let cache = "RUN --mount=type=cache,target=/c,sharing=private true";
        assert_eq!(change(cache), "--mount=type=cache,target=/c,sharing=locked");
        assert_eq!(of("RUN --mount=type=cache,target=/c,sharing=shared true"), Rule::Keep);
        assert_eq!(change("EXPOSE 80 8000-8002/udp"), "80 8000/udp 8001/udp 8002/udp");
        assert_eq!(of("EXPOSE 80  $PORT"), Rule::Keep);
        assert_eq!(of("EXPOSE ${PORT:-80} ${A:-${B:-1}}/udp"), Rule::Keep);
        assert!(refusal("EXPOSE ${A:-1}-${B:-2}").contains("-${B"));
        assert_eq!(of("EXPOSE 53/UDP 0 80/tcp"), Rule::Keep);
        for port in ["99999", "-", "/", "80/", "8080:80", "http", "80/icmp", "-1"] {
            assert!(refusal(&format!("EXPOSE 80 {port}")).contains(port), "{port}");
        }
        assert!(refusal("EXPOSE 9-1").contains("9-1"));
        assert!(refusal("EXPOSE 1-65535").contains("1-65535"));
        assert!(refusal("EXPOSE $A-$B").contains("$A-$B"));
    }

    #[test]
    fn what_would_differ_is_refused_by_name() {
        for line in [
            "COPY --exclude=*.md a /b",
            "COPY --chmod=u=rwX a /b",
            "COPY --nosuch a /b",
            "ADD --from=a a /b",
            "ADD --keep-git-dir=true https://example.com/a.git /b",
            "ADD --unpack=false a.tar /b",
            "ADD --checksum=sha256:0 a /b",
            "RUN --security=insecure id",
            "RUN --network=host id",
            "RUN --network=bridge id",
            "RUN --device=gpu id",
            "RUN --mount=type=ssh id",
            "RUN --mount=type=secret,env=A id",
            "RUN --mount=type=nosuch id",
        ] {
            let flag = line.split([' ', '=']).find(|word| word.starts_with("--")).unwrap();
            assert!(refusal(line).contains(flag), "{line}: {}", refusal(line));
        }
        for git in
            ["https://github.com/a/b.git#v1", "git@github.com:a/b.git", "git://x/y", "ssh://g@h/i"]
        {
            assert!(refusal(&format!("ADD {git} /b")).contains(git));
        }
        assert!(refusal("ADD https://example.com/a.git.tar.gz /git@x").contains("an address"));
        assert_eq!(of("ADD a https://example.com/"), Rule::Keep);
        for line in ["ARG", "ARG =a", "ENV =a", "LABEL = a"] {
            assert!(refusal(line).contains("without a name"), "{line}");
        }
        for line in [r#"COPY ["a\"b", "/c"]"#, r#"ADD --link ["a", "/\"c\""]"#] {
            assert!(refusal(line).contains("`\"`"), "{line}");
        }
        assert_eq!(of(r#"COPY "a" /b"#), Rule::Keep);
        assert!(refusal("INSTALL all").contains("INSTALL"));
        assert!(refusal("ENV a=${b?c}").contains("${b?"));
    }
}
