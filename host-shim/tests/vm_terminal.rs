//! A shell of a running build, and of one that failed and is kept, in a real terminal: tmux has one, types into it, and shows what is on its screen.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Server, text};

const WAITS: &str = r#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir /tmp; echo wait''ing; exec sleep 1000
"#;

/// Ends instead.
const FAILS: &str = "RUN mkdir /tmp; exit 42\n";

#[test]
fn vm_a_shell_in_a_terminal_works() {
    let server = Server::start();
    let id = submit(&server, WAITS, &[]);
    assert!(server.follow(&id).until("waiting"), "{}", server.log());
    use_a_shell(&server, &id);
    assert!(server.run(&["cancel", &id]).status.success());
    server.stop();
}

#[test]
fn vm_a_shell_in_a_failed_step_works_after_a_pause() {
    let server = Server::start();
    let (head, _) = WAITS.rsplit_once("RUN").unwrap();
    let id = submit(&server, &format!("{head}{FAILS}"), &["--keep-failed", "600"]);
    assert_eq!(server.wait(&id)["failure"]["exit_code"], 42, "{}", server.log());
    let qemu = server.processes("qemu-system-x86_64")[0];
    let begun = Instant::now();
    while !std::fs::read_to_string(format!("/proc/{qemu}/stat")).unwrap().contains(") T ") {
        assert!(begun.elapsed() < PATIENCE, "it was not paused");
        // The kernel tells nobody but the parent.
        std::thread::sleep(Duration::from_millis(20));
    }
    use_a_shell(&server, &id);
    assert!(server.run(&["kept", "release", &id]).status.success());
    server.stop();
}

fn submit(server: &Server, dockerfile: &str, flags: &[&str]) -> String {
    let busybox = std::fs::read("/bin/busybox").unwrap();
    server.submit(&[("Dockerfile", dockerfile.as_bytes()), ("busybox", &busybox)], flags)
}

/// All that people do in one, until they leave it.
fn use_a_shell(server: &Server, id: &str) {
    let enter = server.kiln(&["exec", "-it", "-e", "PS1=prompt> ", id, "--", "sh"]);
    let terminal = Terminal::open(&enter);
    terminal.until("prompt>");
    terminal.line("stty size");
    terminal.until("24 80\nprompt>");
    terminal.tmux(&["resize-window", "-x", "101", "-y", "33"]);
    // The size is on its way while the line is typed.
    let begun = Instant::now();
    while !terminal.screen().contains("33 101") && begun.elapsed() < PATIENCE {
        terminal.line("stty size");
        terminal.until_line_after("stty size");
    }
    terminal.until("33 101\nprompt>");

    // A shell that takes the terminal back throws away what was typed before: each time it is waited for.
    terminal.line("clear; echo be''gun; sleep 1000");
    terminal.until("begun");
    terminal.keys(&["C-c"]);
    terminal.until("prompt>");
    terminal.line("echo code=$?");
    terminal.until("code=130\nprompt>");

    terminal.line("clear; vi /tmp/written");
    terminal.until("~");
    terminal.keys(&["i"]);
    terminal.text("first wrd");
    terminal.escape();
    // Back to the r, and an o before it.
    terminal.keys(&["h", "i", "o"]);
    terminal.escape();
    terminal.keys(&["o"]);
    terminal.text("second line");
    terminal.escape();
    terminal.line(":wq");
    terminal.until("prompt>");
    terminal.line("clear; cat -n /tmp/written");
    terminal.until("1  first word");
    terminal.until("2  second line");

    terminal.until("prompt>");
    terminal.line("clear; echo be''gun; cat >/tmp/typed");
    terminal.until("begun");
    terminal.line("typed");
    terminal.keys(&["C-d"]);
    terminal.until("prompt>");
    // With a number: the screen still shows the line as it was typed.
    terminal.line("clear; cat -n /tmp/typed");
    terminal.until("1  typed\nprompt>");
    terminal.keys(&["C-d"]);
    // The terminal is as it was: what is typed now is shown and comes as lines.
    terminal.until("ended with 0");
    terminal.line("still here");
    terminal.until("read still here");
}

/// Far more than anything takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A tmux of the test's own with one window, in which a command runs.
struct Terminal {
    dir: tempfile::TempDir,
}

impl Terminal {
    fn open(command: &Command) -> Self {
        let terminal = Self { dir: tempfile::tempdir().unwrap() };
        let mut words = vec![command.get_program().to_str().unwrap()];
        words.extend(command.get_args().map(|word| word.to_str().unwrap()));
        let words: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
        let script = format!(
            "{}; echo ended with $?; read line; echo read $line; sleep 1000",
            words.join(" ")
        );
        let file = terminal.dir.path().join("script");
        std::fs::write(&file, script).unwrap();
        let mut tmux = terminal.command();
        for (name, value) in command.get_envs() {
            tmux.env(name, value.unwrap());
        }
        let started = tmux
            .args(["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "sh"])
            .arg(&file)
            .status();
        assert!(started.unwrap().success());
        terminal
    }

    fn command(&self) -> Command {
        let mut tmux = Command::new("tmux");
        tmux.arg("-S").arg(Path::new(self.dir.path()).join("tmux")).env_remove("TMUX");
        tmux
    }

    fn tmux(&self, words: &[&str]) -> String {
        let out = self.command().args(words).output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", text(out.stderr));
        text(out.stdout)
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn text(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
    }

    fn line(&self, text: &str) {
        self.text(text);
        self.keys(&["Enter"]);
    }

    /// Out of what is being written in `vi`, whose last line says so. A key right behind it would be taken for a part of it.
    #[track_caller]
    fn escape(&self) {
        self.until("I /tmp/written");
        self.keys(&["Escape"]);
        self.until("- /tmp/written");
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until the screen shows something.
    #[track_caller]
    fn until(&self, what: &str) {
        self.when(what, |screen| screen.contains(what));
    }

    /// Waits until there is something below the last line with these words.
    #[track_caller]
    fn until_line_after(&self, words: &str) {
        self.when(words, |screen| {
            screen.rsplit_once(words).is_some_and(|(_, after)| !after.trim().is_empty())
        });
    }

    #[track_caller]
    fn when(&self, what: &str, shows: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        loop {
            let screen = self.screen();
            if shows(&screen) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "no {what:?} in:\n{screen}");
            // tmux says nothing of its own when a screen changes.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.command().arg("kill-server").status();
    }
}
