//! Which kernel modules to load in what order. Pure: parses `modules.dep` and `modules.builtin`
//! (kmod's text formats, `modules.dep(5)`), reads no file.

use std::collections::{BTreeMap, BTreeSet};

/// What a kernel offers.
#[derive(Debug, Default)]
pub struct Available {
    loadable: BTreeMap<String, Loadable>,
    built_in: BTreeSet<String>,
}

#[derive(Debug)]
struct Loadable {
    path: String,
    needs: Vec<String>,
}

/// What to load.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In load order.
    pub load: Vec<Module>,
    /// Wanted, and part of the kernel already.
    pub built_in: Vec<String>,
    /// Not named by the recipe, but needed by what it names.
    pub added: Vec<String>,
}

/// One module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its file's name without suffixes, `crc32c-intel`.
    pub name: String,
    /// Below the kernel's module directory.
    pub path: String,
}

/// The recipe names something that this kernel does not have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel has no module {0}, neither as a file nor built in")]
pub struct NoSuchModule(pub String);

impl Available {
    /// From the texts of `modules.dep` and `modules.builtin`.
    pub fn parse(dep: &str, builtin: &str) -> Self {
        let loadable = dep.lines().filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let needs = needs.split_whitespace().map(key_of).collect();
            Some((key_of(path), Loadable { path: path.to_owned(), needs }))
        });
        Self { loadable: loadable.collect(), built_in: builtin.lines().map(key_of).collect() }
    }

    /// Orders `wanted`: as the recipe has them, each after all that it needs.
    pub fn plan(&self, wanted: &[String]) -> Result<Plan, NoSuchModule> {
        let named: BTreeSet<String> = wanted.iter().map(|w| key_of(w)).collect();
        let (mut plan, mut seen) = (Plan::default(), BTreeSet::new());
        for name in wanted {
            self.add(&key_of(name), name, &named, &mut seen, &mut plan)?;
        }
        Ok(plan)
    }

    fn add(
        &self,
        key: &str,
        shown: &str,
        named: &BTreeSet<String>,
        seen: &mut BTreeSet<String>,
        plan: &mut Plan,
    ) -> Result<(), NoSuchModule> {
        // Marked before its needs are visited: a circle in the file must not become one here.
        if !seen.insert(key.to_owned()) {
            return Ok(());
        }
        let Some(module) = self.loadable.get(key) else {
            if self.built_in.contains(key) {
                plan.built_in.push(shown.to_owned());
                return Ok(());
            }
            return Err(NoSuchModule(shown.to_owned()));
        };
        // modules.dep lists the deepest need last.
        for need in module.needs.iter().rev() {
            self.add(need, need, named, seen, plan)?;
        }
        let name = stem(&module.path).to_owned();
        if !named.contains(key) {
            plan.added.push(name.clone());
        }
        plan.load.push(Module { name, path: module.path.clone() });
        Ok(())
    }
}

/// Module names treat `-` and `_` as one; paths and suffixes do not count.
fn key_of(path: &str) -> String {
    stem(path).replace('-', "_")
}

fn stem(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.find(".ko").map_or(file, |at| &file[..at])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    // Recorded from linux-image-6.1.0-56-cloud-amd64.
    const DEP: &str = "\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_pci_modern_dev.ko:
kernel/drivers/virtio/virtio_pci_legacy_dev.ko:
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_pci_legacy_dev.ko kernel/drivers/virtio/virtio_pci_modern_dev.ko kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/lib/libcrc32c.ko.xz:
kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko.xz
";
    const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\n";

    fn plan(wanted: &[&str]) -> Result<Plan, NoSuchModule> {
        let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
        Available::parse(DEP, BUILTIN).plan(&wanted)
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.load.iter().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn needs_come_first_and_are_reported_as_added() {
        let plan = plan(&["virtio_pci", "erofs"]).unwrap();
        assert_eq!(
            names(&plan),
            [
                "virtio_ring",
                "virtio",
                "virtio_pci_modern_dev",
                "virtio_pci_legacy_dev",
                "virtio_pci",
                "libcrc32c",
                "erofs"
            ]
        );
        assert_eq!(plan.added.len(), 5);
        assert_eq!(plan.load[5].path, "kernel/lib/libcrc32c.ko.xz");
    }

    #[test]
    fn a_complete_list_is_kept_as_it_is() {
        let wanted = [
            "virtio_ring",
            "virtio",
            "virtio_pci_legacy_dev",
            "virtio_pci_modern_dev",
            "virtio_pci",
        ];
        let plan = plan(&wanted).unwrap();
        assert_eq!(names(&plan), wanted);
        assert!(plan.added.is_empty());
    }

    #[test]
    fn a_list_in_the_wrong_order_is_put_right() {
        assert_eq!(names(&plan(&["erofs", "libcrc32c"]).unwrap()), ["libcrc32c", "erofs"]);
    }

    #[test]
    fn dashes_and_underscores_are_one_and_the_files_name_is_kept() {
        assert_eq!(names(&plan(&["crc32c_intel", "crc32c-intel"]).unwrap()), ["crc32c-intel"]);
    }

    #[test]
    fn built_in_is_reported_and_unknown_refused() {
        assert_eq!(plan(&["ext4"]).unwrap().built_in, ["ext4"]);
        assert_eq!(plan(&["erofs", "zfs"]), Err(NoSuchModule("zfs".into())));
    }

    #[test]
    fn a_circle_ends() {
        let available = Available::parse("a.ko: b.ko\nb.ko: a.ko\n", "");
        assert_eq!(names(&available.plan(&["a".into()]).unwrap()), ["b", "a"]);
    }
}
