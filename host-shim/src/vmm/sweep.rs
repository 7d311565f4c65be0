//! Ending what an earlier server left: exactly the processes that it recorded, or that are in a
//! cgroup of this instance; never a stranger that has got a recorded pid since.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use super::cgroup::CgroupRoot;
use super::record::Record;
use super::{REMOVAL_DEADLINE, process};

/// What a sweep found and removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// VMs, by id.
    pub vms: BTreeSet<String>,
    /// Processes that were ended by their record; those that only their cgroup knew are not counted.
    pub processes: usize,
    /// What could not be removed, and why.
    pub failures: Vec<String>,
}

/// Sweeps a run directory. VMs of this process are `live`, and left alone.
pub(crate) fn sweep(
    run_dir: &Path,
    cgroups: Option<&CgroupRoot>,
    boot: &str,
    live: &BTreeSet<String>,
) -> Swept {
    let mut swept = Swept::default();
    let entries = std::fs::read_dir(run_dir).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let id = entry.file_name().to_string_lossy().into_owned();
        if live.contains(&id) {
            continue;
        }
        let mut gone = true;
        match Record::read(&entry.path()) {
            Ok(record) if record.boot == boot => {
                let cgroup = record.cgroups();
                for process in record.processes {
                    match process::end(process, Instant::now() + REMOVAL_DEADLINE) {
                        Ok(ended) => swept.processes += usize::from(ended),
                        Err(error) => {
                            gone = false;
                            swept.failures.push(format!("{id}: {error}"));
                        }
                    }
                }
                if let Some(Err(error)) =
                    cgroup.map(|c| c.remove(Instant::now() + REMOVAL_DEADLINE))
                {
                    gone = false;
                    swept.failures.push(format!("the cgroup of {id}: {error}"));
                }
            }
            // Of an earlier boot, or killed before it was written: nothing runs that a cgroup does not know.
            Ok(_) | Err(_) => {}
        }
        // The record stays while something of it does.
        if gone && let Err(error) = std::fs::remove_dir_all(entry.path()) {
            swept.failures.push(format!("{}: {error}", entry.path().display()));
        }
        swept.vms.insert(id);
    }
    for (id, cgroup) in cgroups.map(CgroupRoot::existing).unwrap_or_default() {
        if live.contains(&id) {
            continue;
        }
        if let Err(error) = cgroup.remove(Instant::now() + REMOVAL_DEADLINE) {
            swept.failures.push(format!("the cgroup of {id}: {error}"));
        }
        swept.vms.insert(id);
    }
    swept
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::Arc;

    use super::super::limits::Limits;
    use super::super::process::{ProcessId, start_time};
    use super::*;

    const BOOT: &str = "this-boot";

    fn sleeper() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        (child, ProcessId { pid, start: start_time(pid).unwrap() })
    }

    fn leftover(run_dir: &Path, id: &str, boot: &str, process: ProcessId) {
        let dir = run_dir.join(id);
        std::fs::create_dir_all(dir.join("sock")).unwrap();
        let record = Record {
            boot: boot.to_owned(),
            uid: 1,
            slot: 0,
            started_at: 0,
            cgroup: None,
            limits: vec![],
            processes: vec![process],
        };
        record.write(&dir).unwrap();
    }

    #[test]
    fn a_recorded_process_ends_and_a_stranger_does_not() {
        let run = tempfile::tempdir().unwrap();
        let (mut left, recorded) = sleeper();
        let (mut stranger, other) = sleeper();
        let (mut ours, live) = sleeper();
        let (mut rebooted, earlier) = sleeper();
        leftover(run.path(), "left", BOOT, recorded);
        leftover(run.path(), "reused", BOOT, ProcessId { start: other.start - 1, ..other });
        leftover(run.path(), "live", BOOT, live);
        leftover(run.path(), "rebooted", "another-boot", earlier);
        std::fs::create_dir(run.path().join("unwritten")).unwrap();

        let swept = sweep(run.path(), None, BOOT, &BTreeSet::from(["live".to_owned()]));

        let vms: Vec<_> = swept.vms.iter().map(String::as_str).collect();
        assert_eq!(vms, ["left", "rebooted", "reused", "unwritten"]);
        assert_eq!((swept.processes, swept.failures.len()), (1, 0));
        assert!(!left.wait().unwrap().success());
        for (child, id) in [(&mut stranger, other), (&mut ours, live), (&mut rebooted, earlier)] {
            assert!(process::alive(id), "a stranger was ended");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let rest: Vec<_> =
            std::fs::read_dir(run.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(rest, ["live"]);
        assert_eq!(
            sweep(run.path(), None, BOOT, &BTreeSet::from(["live".to_owned()])),
            Swept::default()
        );
    }

    #[test]
    fn what_only_its_cgroup_knows_ends_too() {
        let run = tempfile::tempdir().unwrap();
        let root = Arc::new(
            CgroupRoot::find(&format!("sweep-{}", std::process::id()))
                .expect("root can write cgroups"),
        );
        let cgroup = root.create("unrecorded", &Limits { memory_mb: 64, cpus: 1 }).unwrap();
        let (mut child, _) = sleeper();
        for dir in cgroup.dirs() {
            std::fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        let swept = sweep(run.path(), Some(&root), BOOT, &BTreeSet::new());
        assert_eq!(swept.vms.len(), 1);
        assert_eq!(swept.failures, Vec::<String>::new());
        assert!(!child.wait().unwrap().success());
        assert!(root.existing().is_empty());
    }

    #[test]
    fn a_record_that_is_nonsense_ends_nobody() {
        let run = tempfile::tempdir().unwrap();
        for (id, text) in [
            ("a", "{"),
            (
                "b",
                r#"{"boot":"this-boot","uid":0,"cgroup":null,"processes":[{"pid":-1,"start":0}]}"#,
            ),
            (
                "c",
                r#"{"boot":"this-boot","uid":0,"cgroup":null,"processes":[{"pid":0,"start":0},{"pid":1,"start":1}]}"#,
            ),
        ] {
            std::fs::create_dir(run.path().join(id)).unwrap();
            std::fs::write(run.path().join(id).join("record.json"), text).unwrap();
        }
        let swept = sweep(run.path(), None, BOOT, &BTreeSet::new());
        assert_eq!((swept.vms.len(), swept.processes), (3, 0));
        assert!(swept.failures.is_empty());
    }
}
