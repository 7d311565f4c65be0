# An image to a disk: kiln-image against umoci and mke2fs, which have no step in common that runs beside another.
# shellcheck shell=bash

# disk_pairs PAIRS: milliseconds as the samples kiln_disk and umoci_disk, and their ratio.
disk_pairs() {
  install_packages umoci
  # umoci reads no zstd: both get the same gzip.
  skopeo copy --quiet --dest-compress --dest-compress-format gzip "oci:$STATE/debian" "oci:$work/layout:bench"
  local i
  for ((i = 0; i < $1; i++)); do
    # Each of a pair goes first in turn.
    if ((i % 2 == 0)); then
      milliseconds kiln_disk >>"$work/kiln_disk"
      milliseconds umoci_disk >>"$work/umoci_disk"
    else
      milliseconds umoci_disk >>"$work/umoci_disk"
      milliseconds kiln_disk >>"$work/kiln_disk"
    fi
    rm -rf "$work/disk" "$work/unpacked"
  done
  ratios umoci_disk kiln_disk
}

kiln_disk() {
  kiln-image disk "$work/layout" "$work/disk"
}

# With the room that kiln-image leaves.
umoci_disk() {
  rm -f "$work/disk"
  umoci unpack --rootless --image "$work/layout:bench" "$work/unpacked"
  truncate -s "$(($(du -sm "$work/unpacked" | cut -f 1) + 256))M" "$work/disk"
  mke2fs -q -t ext4 -d "$work/unpacked/rootfs" "$work/disk"
  sync "$work/disk"
}

# milliseconds COMMAND...: how long it takes.
milliseconds() {
  local begun=$EPOCHREALTIME
  "$@" >/dev/null
  echo $(((${EPOCHREALTIME/./} - ${begun/./}) / 1000))
}
