# The machine that Kiln's VMs have, for those that a benchmark boots itself.
# shellcheck shell=bash disable=SC2034

MACHINE=(
  -nodefaults -no-user-config -display none -nic none
  -M q35,memory-backend=mem,smm=off,sata=off,i8042=off,smbus=off,usb=off,vmport=off
  -accel "tcg,thread=multi" -cpu Nehalem -smp 2 -m 2048M
  -object memory-backend-memfd,id=mem,size=2048M,share=on
)

# Kiln's own, as its golden test has it.
kernel_cmdline() {
  sed -n 's/^-append //p' "$ROOT"/host-shim/src/vmm/snapshots/*__vm_tcg.snap
}

GUEST_EXAMPLES=$ROOT/target/$GUEST_TARGET/release/examples

# The benchmarks' own programs for VMs. Static as the agent is, for the same reason.
build_guest_examples() {
  local -x CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
  cargo build --release --quiet --manifest-path "$ROOT/Cargo.toml" -p kiln-agent --target "$GUEST_TARGET" --examples
}
