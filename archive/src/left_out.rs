//! What was not packed because nobody may unpack it: devices, sockets and FIFOs.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::problem::shown;

/// So many are named; the others are counted.
const NAMED: usize = 5;

/// What an archive lacks of the directories in it.
#[derive(Debug, Default)]
pub struct LeftOut {
    count: u64,
    /// The first ones, safe to show.
    names: Vec<String>,
}

impl LeftOut {
    pub(super) fn add(&mut self, name: &Path) {
        self.count += 1;
        if self.names.len() < NAMED {
            self.names.push(shown(name.as_os_str().as_bytes()));
        }
    }

    /// Whether it lacks nothing.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// One line: how many, and the names of some.
impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, names } = self;
        let what =
            if *count == 1 { "device, socket or FIFO" } else { "devices, sockets and FIFOs" };
        write!(f, "{count} {what}: {}", names.join(", "))?;
        if *count > names.len() as u64 { f.write_str(", …") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_some_and_counts_all() {
        let mut left_out = LeftOut::default();
        assert!(left_out.is_empty());
        left_out.add(Path::new("dev/x\n"));
        assert_eq!(left_out.to_string(), "1 device, socket or FIFO: dev/x\\n");
        (2..=NAMED).for_each(|n| left_out.add(Path::new(&n.to_string())));
        assert_eq!(left_out.to_string(), "5 devices, sockets and FIFOs: dev/x\\n, 2, 3, 4, 5");
        left_out.add(Path::new("6"));
        assert_eq!(left_out.to_string(), "6 devices, sockets and FIFOs: dev/x\\n, 2, 3, 4, 5, …");
    }
}
