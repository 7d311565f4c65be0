# The stream from guest to host, and control messages under a flood, over the vsock device of Kiln's VMs.
# shellcheck shell=bash

# vsock_pairs PAIRS: the samples of what bench_host.rs prints, and their ratios.
vsock_pairs() {
  step "Building the guests of the benchmarks" build_guest_examples
  local built=$GUEST_EXAMPLES
  mkdir -p "$work/guest"
  cp "$built/bench_guest" "$work/guest/init"
  # A later archive's file replaces an earlier one's: the modules are the bundle's, the init is ours.
  (cat "$STATE/builder/initrd" && cd "$work/guest" && echo init | cpio --quiet -o -H newc) >"$work/vsock-initrd"
  step "Measuring $1 pairs: streams, round trips" vsock_vm "$built/bench_host" "$1"
  columns "$work/vsock" bare small codec framed lines idle_p50 idle_p99 flood_p50 flood_p99
  ratios codec bare
  ratios codec small
  ratios framed bare
  ratios flood_p99 idle_p99
}

# One boot for all pairs; ends by the host program's own deadline. In a shell of its own, which takes its processes along.
vsock_vm() {
  local host
  vm_pids=()
  trap 'kill -KILL "${vm_pids[@]}" 2>/dev/null' EXIT
  "$1" "$work/v" "$2" >"$work/vsock" &
  host=$!
  vm_pids+=("$host")
  vhost-device-vsock --guest-cid 3 --socket "$work/vu" --uds-path "$work/v" &
  vm_pids+=($!)
  wait_for_socket "$work/vu"
  # The guest's init ends when it is done, which the kernel takes for a panic.
  qemu-system-x86_64 "${MACHINE[@]}" -no-reboot -serial stdio \
    -chardev "socket,id=vsock,path=$work/vu" -device vhost-user-vsock-pci,chardev=vsock,event_idx=off \
    -kernel "$STATE/builder/kernel" -initrd "$work/vsock-initrd" -append "$(kernel_cmdline) kiln_pairs=$2" &
  vm_pids+=($!)
  wait "$host"
}

wait_for_socket() {
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    [[ -S $1 ]] && return
    sleep 0.05
  done
  fail "$1 did not appear"
}
