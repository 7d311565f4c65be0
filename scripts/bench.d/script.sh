# A VM of the builder's kernel and root that runs a script instead of the agent's session: agent/examples/bench_build.rs.
# shellcheck shell=bash

# A later archive's file replaces an earlier one's: the modules are the bundle's, the init is ours.
script_initrd() {
  step "Building the guests of the benchmarks" build_guest_examples
  mkdir -p "$work/script-guest"
  cp "$GUEST_EXAMPLES/bench_script" "$work/script-guest/init"
  (cat "$STATE/builder/initrd" && cd "$work/script-guest" && echo init | cpio --quiet -o -H newc) >"$work/script-initrd"
}

# script_disk NAME DIRECTORY: the third disk, with the directory's files, the file `script` among them.
script_disk() {
  (cd "$2" && tar -cf "$work/$1.tar" .)
  # A disk has whole sectors.
  truncate -s %4096 "$work/$1.tar"
}

# script_run NAME: milliseconds that the disk's script took. The scratch disk is one of the server's.
script_run() {
  cp --sparse=always "$STATE"/data/vm/templates/scratch-*.ext4 "$work/scratch"
  qemu-system-x86_64 "${MACHINE[@]}" -no-reboot -serial stdio \
    -drive "file=$STATE/builder/root.erofs,format=raw,if=virtio,readonly=on" \
    -drive "file=$work/scratch,format=raw,if=virtio,cache=unsafe,discard=unmap" \
    -drive "file=$work/$1.tar,format=raw,if=virtio,readonly=on" \
    -kernel "$STATE/builder/kernel" -initrd "$work/script-initrd" -append "$(kernel_cmdline)" >"$work/console" 2>&1
  sed -n 's/.*script_ms=\([0-9]*\).*/\1/p' "$work/console" | grep . ||
    fail "the script $1 failed in its VM: $(tail -n 5 "$work/console")"
}
