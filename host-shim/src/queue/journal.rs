//! What the next server has to know of a VM to go on with its build: `session.json` in the VM's own directory, where only the
//! server can look. Nobody waits for the disk: a crash of the host takes the VM too.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_protocol::hello::TOKEN_LEN;
use serde::{Deserialize, Serialize};

use super::egress_log::EgressRecord;
use crate::build::{Reached, Usage};
use crate::gateway::guests::{GuestContext, Seen};
use crate::session::Tokens;

const FILE: &str = "session.json";

/// A manifest's worth of blobs for each of the most that one build may pull.
const MAX_BYTES: u64 = 16 << 20;

/// What is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Notes {
    /// For the preambles of the VM's connections.
    pub nonce: [u8; TOKEN_LEN],
    /// What the agent shows; none before its Hello.
    pub tokens: Option<Tokens>,
    /// Whether it has all of its source.
    pub source_sent: bool,
    /// Whether a registry is asked for something, or a connection out is open: it would break, and what uses it with it.
    pub busy: bool,
    /// What was pulled.
    pub seen: Seen,
    /// What was reached.
    pub reached: Vec<Reached>,
    /// As far as it was known when the source was sent.
    pub usage: Usage,
    /// What the VM runs.
    pub builder_digest: String,
    /// Its kernel.
    pub kernel_digest: String,
}

impl Notes {
    /// Of the VM in this directory.
    pub fn read(vm_dir: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        std::fs::File::open(vm_dir.join(FILE))?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Whether another server can go on from here, and nothing in the VM notices but the agent.
    pub fn can_be_continued(&self) -> bool {
        self.tokens.is_some() && self.source_sent && !self.busy
    }
}

/// The writer of one VM's notes.
pub struct Journal {
    file: PathBuf,
    state: Mutex<State>,
}

struct State {
    notes: Notes,
    /// Requests and connections that are open.
    tunnels: usize,
}

/// A request, or a connection that is open.
pub struct Tunnel {
    journal: Arc<Journal>,
    context: Arc<GuestContext>,
    record: Option<Arc<EgressRecord>>,
}

impl Journal {
    /// For the VM in this directory, beginning with these notes.
    pub fn new(vm_dir: &Path, notes: Notes) -> Arc<Self> {
        let state = Mutex::new(State { notes, tunnels: 0 });
        let journal = Self { file: vm_dir.join(FILE), state };
        journal.change(|_| {});
        Arc::new(journal)
    }

    /// Changes the notes. What cannot be written is not left as it was: nobody is to go on from there.
    pub fn change(&self, change: impl FnOnce(&mut Notes)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state.notes);
        self.write(&state.notes);
    }

    /// A request to a registry begins, or a connection out; it goes on until this is dropped.
    pub fn tunnel(
        self: &Arc<Self>,
        context: &Arc<GuestContext>,
        record: Option<&Arc<EgressRecord>>,
    ) -> Tunnel {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tunnels += 1;
        if state.tunnels == 1 {
            state.notes.busy = true;
            self.write(&state.notes);
        }
        Tunnel {
            journal: Arc::clone(self),
            context: Arc::clone(context),
            record: record.map(Arc::clone),
        }
    }

    fn write(&self, notes: &Notes) {
        let written = || -> io::Result<()> {
            let dir = self.file.parent().ok_or(io::ErrorKind::NotFound)?;
            let mut new = tempfile::NamedTempFile::new_in(dir)?;
            new.write_all(&serde_json::to_vec(notes)?)?;
            new.persist(&self.file)?;
            Ok(())
        };
        if let Err(error) = written() {
            let _ = std::fs::remove_file(&self.file);
            tracing::debug!(%error, file = %self.file.display(), "cannot note how a session goes on");
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let mut state = self.journal.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tunnels -= 1;
        if state.tunnels == 0 {
            state.notes.busy = false;
            state.notes.seen = self.context.all_seen();
            if let Some(record) = &self.record {
                for reached in record.reached_so_far() {
                    if !state.notes.reached.contains(&reached) {
                        state.notes.reached.push(reached);
                    }
                }
            }
            self.journal.write(&state.notes);
        }
    }
}
