//! `.dockerignore`: which paths stay at home. Pure: patterns and paths in, a verdict out.
//!
//! The rules are Docker's own, not gitignore's: a pattern is anchored at the context's root, `**`
//! crosses directories, a later line wins, `!` takes back, and a path is excluded with its parent.
//! Source: <https://github.com/moby/patternmatcher> (`patternmatcher.go`, `ignorefile.go`), of which
//! the odd cases are kept: `**foo` without other wildcards is any path that ends in `foo`.
//! One is not: in `[…]`, where moby's translation breaks for `*` and `?`, those are plain characters,
//! as in Go's `filepath.Match` whose syntax the patterns are said to have.

use regex::Regex;

/// A pattern that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// `[` without its end, a `\` at the end, a range without its end.
    #[error("the pattern {0:?} has a syntax error")]
    Syntax(String),
    /// A `!` that takes nothing back.
    #[error("a pattern is only \"!\"")]
    OnlyNegation,
}

/// The patterns of a file, in order.
#[derive(Clone, Debug, Default)]
pub struct Excludes {
    patterns: Vec<Pattern>,
}

#[derive(Clone, Debug)]
struct Pattern {
    /// Set for `!`: a match takes the path back in.
    includes: bool,
    /// Without the `!`, cleaned.
    text: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    Exact,
    Prefix(String),
    Suffix(String),
    Regex(Regex),
}

impl Excludes {
    /// The patterns of a file's text.
    pub fn parse(text: &str) -> Result<Self, BadPattern> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let patterns = text.lines().filter_map(normalize).map(|p| Pattern::new(&p));
        Ok(Self { patterns: patterns.collect::<Result<_, _>>()? })
    }

    /// Takes exactly this path back in, whatever the patterns say.
    pub fn keep(&mut self, path: &str) {
        let matcher = Matcher::Exact;
        self.patterns.push(Pattern { includes: true, text: path.to_owned(), matcher });
    }

    /// Whether a path, relative and with `/`, stays at home: it or one of its parents matches, and no
    /// later pattern takes it back.
    pub fn excludes(&self, path: &str) -> bool {
        let parents = || path.match_indices('/').map(|(end, _)| &path[..end]);
        let mut excluded = false;
        for pattern in &self.patterns {
            // The other kind changes nothing now.
            if pattern.includes == excluded
                && (pattern.matches(path) || parents().any(|parent| pattern.matches(parent)))
            {
                excluded = !pattern.includes;
            }
        }
        excluded
    }

    /// Whether a `!` may take something below an excluded directory back in.
    pub fn may_include_below(&self, directory: &str) -> bool {
        self.patterns.iter().filter(|p| p.includes).any(|pattern| {
            let literal = pattern.text.find(['*', '?', '[', '\\']).unwrap_or(pattern.text.len());
            if literal < pattern.text.len() {
                let head = &pattern.text[..literal];
                let inside = format!("{directory}/");
                head.starts_with(&inside) || inside.starts_with(head)
            } else {
                // A parent that is taken back brings what is in it.
                let (text, inside) = (format!("{}/", pattern.text), format!("{directory}/"));
                text.starts_with(&inside) || inside.starts_with(&text)
            }
        })
    }
}

/// A line as moby's `ignorefile` reads it; `None` for comments and empty lines.
fn normalize(line: &str) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let line = line.trim();
    let (mark, pattern) = match line.strip_prefix('!') {
        Some(rest) => ("!", rest.trim()),
        None => ("", line),
    };
    if line.is_empty() {
        return None;
    }
    let cleaned = if pattern.is_empty() { String::new() } else { clean(pattern) };
    let anchored = match cleaned.strip_prefix('/') {
        Some(rest) if !rest.is_empty() => rest,
        _ => &cleaned,
    };
    Some(format!("{mark}{anchored}"))
}

/// Go's `filepath.Clean`, lexically.
fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (rooted, parts.join("/")) {
        (true, joined) => format!("/{joined}"),
        (false, joined) if joined.is_empty() => ".".into(),
        (false, joined) => joined,
    }
}

impl Pattern {
    fn new(pattern: &str) -> Result<Self, BadPattern> {
        let cleaned = clean(pattern);
        let (includes, text) = match cleaned.strip_prefix('!') {
            Some("") => return Err(BadPattern::OnlyNegation),
            Some(rest) => (true, rest.to_owned()),
            None => (false, cleaned),
        };
        let matcher = compile(&text)?;
        Ok(Self { includes, text, matcher })
    }

    fn matches(&self, path: &str) -> bool {
        match &self.matcher {
            Matcher::Exact => path == self.text,
            Matcher::Prefix(prefix) => path.starts_with(prefix),
            Matcher::Suffix(suffix) => {
                path.ends_with(suffix) || suffix.strip_prefix('/') == Some(path)
            }
            Matcher::Regex(regex) => regex.is_match(path),
        }
    }
}

fn compile(pattern: &str) -> Result<Matcher, BadPattern> {
    let syntax = || BadPattern::Syntax(pattern.to_owned());
    let mut regex = String::from("^");
    let mut matcher = Matcher::Exact;
    // The regex stands only once all of it is there.
    let mut is_regex = false;
    let mut chars = pattern.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '*' if chars.next_if(|(_, c)| *c == '*').is_some() => {
                // `**/` is as `**`.
                chars.next_if(|(_, c)| *c == '/');
                let plain_so_far = !is_regex && matches!(matcher, Matcher::Exact);
                if at == 0 {
                    matcher = Matcher::Suffix(pattern[2..].to_owned());
                    regex.push_str(if chars.peek().is_none() { ".*" } else { "(.*/)?" });
                } else if chars.peek().is_some() {
                    regex.push_str("(.*/)?");
                    is_regex = true;
                } else if plain_so_far {
                    matcher = Matcher::Prefix(pattern[..at].to_owned());
                } else {
                    regex.push_str(".*");
                    is_regex = true;
                }
            }
            '*' => {
                regex.push_str("[^/]*");
                is_regex = true;
            }
            '?' => {
                regex.push_str("[^/]");
                is_regex = true;
            }
            '\\' => {
                let (_, next) = chars.next().ok_or_else(syntax)?;
                regex.push_str(&regex::escape(next.encode_utf8(&mut [0; 4])));
                is_regex = true;
            }
            '[' => {
                regex.push_str(&class(&mut chars).ok_or_else(syntax)?);
                is_regex = true;
            }
            c => regex.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    if !is_regex {
        return Ok(matcher);
    }
    regex.push('$');
    Regex::new(&regex).map(Matcher::Regex).map_err(|_| syntax())
}

/// The rest of a `[…]` by the rules of Go's `filepath.Match`, as a regex; `None` if it is wrong.
fn class(chars: &mut std::iter::Peekable<std::str::CharIndices<'_>>) -> Option<String> {
    let mut regex = String::from("[");
    if chars.next_if(|(_, c)| *c == '^').is_some() {
        regex.push('^');
    }
    let mut empty = true;
    while empty || chars.next_if(|(_, c)| *c == ']').is_none() {
        let low = class_char(chars)?;
        let high = match chars.next_if(|(_, c)| *c == '-') {
            Some(_) => class_char(chars)?,
            None => low,
        };
        if high < low {
            // Go finds nothing in such a range; a regex would not compile.
            return None;
        }
        for part in [r"\x{", &hex(low), r"}-\x{", &hex(high), "}"] {
            regex.push_str(part);
        }
        empty = false;
    }
    regex.push(']');
    Some(regex)
}

fn hex(c: char) -> String {
    format!("{:x}", u32::from(c))
}

fn class_char(chars: &mut std::iter::Peekable<std::str::CharIndices<'_>>) -> Option<char> {
    match chars.next()?.1 {
        '-' | ']' => None,
        '\\' => Some(chars.next()?.1),
        c => Some(c),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
#[path = "dockerignore_tests.rs"]
mod tests;
