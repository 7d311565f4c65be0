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
