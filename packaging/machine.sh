# A Debian whose first process is systemd, in namespaces of its own: mounts, processes, cgroups, System V IPC and host name. Its network is
# the caller's. Sourced by packaging/test. What it does to its kernel's settings and devices it cannot do to this machine's.
# shellcheck shell=bash

# How long a boot, or the end of one, may take.
BOOT_LIMIT=90

# machine_make LOWER WORK: the files of a machine, those of LOWER and what it writes, in memory. They are $MACHINE.
machine_make() {
  local lower=$1 work=$2
  mkdir -p "$work"
  mount -t tmpfs -o size=8g tmpfs "$work"
  mkdir "$work"/{upper,work,root,cgroups}
  mount -t overlay -o "lowerdir=$lower,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
  MACHINE=$work/root
  # Without it systemd takes each boot for the first one.
  tr -d - </proc/sys/kernel/random/uuid >"$MACHINE/etc/machine-id"
  echo machine >"$MACHINE/etc/hostname"
  # The one hierarchy of version 2, whatever this machine has mounted.
  mount -t cgroup2 cgroup2 "$work/cgroups"
  MACHINE_CGROUP=$work/cgroups/kiln-package-test
  machine_cut
}

# machine_boot: starts systemd and waits until nothing is left to be started.
machine_boot() {
  mkdir "$MACHINE_CGROUP"
  # A namespace of cgroups begins where its first process is.
  bash -c 'echo $$ >"$1" && shift && exec "$@"' - "$MACHINE_CGROUP/cgroup.procs" \
    unshare --mount --pid --cgroup --ipc --uts --fork --kill-child \
    bash -euc "$(declare -f machine_init); machine_init $(printf %q "$MACHINE")" \
    >>"$MACHINE/var/log/console" 2>&1 </dev/null &
  MACHINE_JOB=$!
  machine_waits "$BOOT_LIMIT" machine_runs || {
    cat "$MACHINE/var/log/console"
    fail "systemd does not run here, or did not start everything within $BOOT_LIMIT s"
  }
}

# The first process: mounts what a container has, and becomes systemd.
machine_init() {
  local root=$1 name
  mount -t proc proc "$root/proc"
  mount --bind "$root/proc/sys" "$root/proc/sys"
  mount -o remount,bind,ro "$root/proc/sys"
  # Read-only: systemd then starts nothing that is for a machine with devices.
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
  mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
  mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
  for name in null zero full random urandom tty kvm; do
    [[ -e /dev/$name ]] || continue
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
  done
  mkdir "$root"/dev/{pts,shm}
  mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
  mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
  ln -s pts/ptmx "$root/dev/ptmx"
  ln -s /proc/self/fd "$root/dev/fd"
  for name in stdin:0 stdout:1 stderr:2; do
    ln -s "/proc/self/fd/${name#*:}" "$root/dev/${name%:*}"
  done
  mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
  cd "$root" || return
  pivot_root . mnt
  umount --lazy /mnt
  exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-target=console --show-status=no
}

machine_runs() {
  MACHINE_INIT=$(pgrep --parent "$MACHINE_JOB") || return 1
  MACHINE_ENTER=(nsenter --target "$MACHINE_INIT" --mount --pid --cgroup --ipc --uts --root --wd=/)
  # A unit that failed is told by the test, by its name.
  [[ $(in_machine systemctl is-system-running 2>/dev/null) =~ ^(running|degraded)$ ]]
}

# in_machine COMMAND...: runs it there, as root.
in_machine() { "${MACHINE_ENTER[@]}" "$@"; }

# machine_cut: the power fails: everything ends at once. Its files stay.
machine_cut() {
  if [[ -n ${MACHINE_JOB:-} ]]; then
    kill -KILL "$MACHINE_JOB"
    wait "$MACHINE_JOB" || true
    MACHINE_JOB=
  fi
  if [[ -d $MACHINE_CGROUP ]]; then
    machine_waits 10 machine_ended
    find "$MACHINE_CGROUP" -depth -type d -exec rmdir {} +
  fi
}

machine_ended() { grep -qx 'populated 0' "$MACHINE_CGROUP/cgroup.events"; }

# machine_waits SECONDS COMMAND...: until the command succeeds; fails when the time is over.
machine_waits() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}
