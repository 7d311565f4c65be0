//! The shell of `CMD` and `ENTRYPOINT` in their shell form: a stage's `SHELL`, where the engine always takes `/bin/sh -c`.
//! Pure. (A shell that an image of a registry brings is not known here; docs/DOCKERFILE.md says so.)

use super::words::Words;

/// The shells of the stages so far; the last one is being read.
#[derive(Default)]
pub struct Shells(Vec<Stage>);

#[derive(Default)]
struct Stage {
    name: Option<String>,
    shell: Option<Vec<String>>,
}

impl Shells {
    /// Takes the next instruction. Gives it in the form with a list, where the engine would take another shell.
    pub fn see(&mut self, words: &Words<'_>) -> Option<String> {
        match words.keyword.as_str() {
            "FROM" => {
                let mut given = words.rest.split_ascii_whitespace();
                let base = given.next().unwrap_or_default();
                let is_base = |stage: &&Stage| stage.name.as_deref() == Some(base);
                let shell = self.0.iter().rfind(is_base).and_then(|stage| stage.shell.clone());
                self.0.push(Stage { name: given.nth(1).map(str::to_owned), shell });
            }
            "SHELL" => {
                let shell = serde_json::from_str(words.rest).ok();
                if let Some(stage) = self.0.last_mut() {
                    stage.shell = shell.filter(|shell: &Vec<String>| !shell.is_empty());
                }
            }
            "CMD" | "ENTRYPOINT" => return self.in_list(words),
            _ => {}
        }
        None
    }

    fn in_list(&self, words: &Words<'_>) -> Option<String> {
        let mut list = self.0.last()?.shell.clone()?;
        let command = words.rest.trim_end();
        if command.is_empty() || serde_json::from_str::<Vec<String>>(command).is_ok() {
            return None;
        }
        list.push(command.to_owned());
        let list = serde_json::to_string(&list).ok()?;
        Some(format!("{} {list}", words.keyword))
    }
}
