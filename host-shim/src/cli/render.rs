//! What a running build looks like on stderr.

use std::io::Write;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::escape::{escape, escape_json};
use super::follow::Received;
use super::json_line;
use super::lines::{Lines, step_name, step_state};
use super::view::{EventView, size};

/// How to show progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Progress {
    /// A live view on a terminal, plain lines otherwise.
    Auto,
    /// One line for everything that happens.
    Plain,
    /// One JSON object a line: the server's events, and what kiln itself has to say.
    Json,
}

/// How often the live view's clock moves on.
const TICK: Duration = Duration::from_millis(120);

/// Shows progress on stderr.
#[derive(Debug)]
pub struct Renderer {
    lines: Lines,
    view: View,
}

#[derive(Debug)]
enum View {
    Plain,
    /// Lines above, what runs now in the last line.
    Live(ProgressBar),
    Json,
}

impl Renderer {
    /// A renderer for stderr.
    pub fn new(progress: Progress) -> Self {
        let view = match progress {
            Progress::Plain => View::Plain,
            Progress::Json => View::Json,
            Progress::Auto => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
                if bar.is_hidden() { View::Plain } else { View::Live(live(bar)) }
            }
        };
        Self { lines: Lines::default(), view }
    }

    /// Shows an event.
    pub fn event(&mut self, received: &Received) {
        match &self.view {
            View::Json => line(&escape_json(&received.data)),
            View::Plain => {
                for text in self.lines.event(&received.event) {
                    line(&text);
                }
            }
            View::Live(bar) => live_event(bar, &mut self.lines, &received.event),
        }
    }

    /// Shows a text of the client's own.
    pub fn note(&self, text: &str) {
        let shown = format!("kiln | {}", escape(text));
        match &self.view {
            View::Json => line(&json_line::note(text, crate::clock::now())),
            View::Plain => line(&shown),
            View::Live(bar) => bar.println(shown),
        }
    }

    /// Shows how much of the source is sent.
    pub fn sending(&self, bytes: u64) {
        if let View::Live(bar) = &self.view {
            bar.set_message(format!("sending the source  {}", size(bytes)));
        }
    }

    /// Shows that the connection is being made again.
    pub fn reconnecting(&self, why: &str) {
        self.note(&format!("the connection was lost ({why}); connecting again"));
    }

    /// Ends the view, so that other output can follow.
    pub fn finish(&mut self) {
        let left = self.lines.finish();
        match &self.view {
            View::Json => {}
            View::Plain => left.iter().map(String::as_str).for_each(line),
            View::Live(bar) => {
                for text in left {
                    bar.println(text);
                }
                bar.finish_and_clear();
            }
        }
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        self.finish();
    }
}

fn live(bar: ProgressBar) -> ProgressBar {
    // A template that is a constant is right or found by the first test.
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4}  {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    bar
}

/// In the live view the last line shows the running step; when it ends, that becomes one line.
fn live_event(bar: &ProgressBar, lines: &mut Lines, event: &EventView) {
    let mut texts = lines.event(event);
    match event {
        EventView::Step { state, .. } => {
            texts.pop();
            let name = step_name(event).unwrap_or_default();
            if state == "started" {
                bar.reset_elapsed();
                bar.set_message(name);
            } else {
                let mark = if state == "failed" { "✗" } else { "✓" };
                texts.push(format!("{mark} {name}  {}", step_state(event).unwrap_or_default()));
                bar.reset_elapsed();
                bar.set_message("building");
            }
        }
        EventView::Status { .. } => {
            bar.reset_elapsed();
            let status = texts.pop().unwrap_or_default();
            bar.set_message(status.trim_start_matches("kiln | ").to_owned());
        }
        _ => {}
    }
    for text in texts {
        bar.println(text);
    }
}

/// A line on stderr. Nobody is left to tell when that is closed.
fn line(text: &str) {
    let _ = std::io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}
