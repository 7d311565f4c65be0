# A source on its way into the VM and onto its disk, against a copy by tar on that disk.
# shellcheck shell=bash

# source_pairs PAIRS: milliseconds for 100 MB in 5,000 files as the samples kiln_source and tar_source, and their ratio.
source_pairs() {
  script_initrd
  mkdir -p "$work/many/source" "$work/none"
  (
    cd "$work/many/source"
    mkdir "d"{0..49}
    for ((i = 0; i < 5000; i++)); do
      head -c 20000 /dev/urandom >"d$((i % 50))/$i"
    done
  )
  # Nothing of it is used: only the way in is measured.
  printf 'FROM scratch\nLABEL a=b\n' | tee "$work/none/Dockerfile" >"$work/many/source/Dockerfile"
  echo 'mkdir copy && tar -C source -c . | cat | tar -C copy -x' >"$work/many/script"
  script_disk many "$work/many"
  local i
  for ((i = 0; i < $1; i++)); do
    if ((i % 2 == 0)); then
      source_run >>"$work/kiln_source"
      script_run many >>"$work/tar_source"
    else
      script_run many >>"$work/tar_source"
      source_run >>"$work/kiln_source"
    fi
  done
  ratios kiln_source tar_source
}

# From Hello until the engine runs, less what that takes without a source.
source_run() {
  local many none
  many=$(engine_start "$work/many/source")
  none=$(engine_start "$work/none")
  echo $((many - none))
}

engine_start() {
  local id
  id=$(kiln build "$1" --detach)
  kiln logs -f "$id" >/dev/null 2>&1
  kiln show "$id" --format json | jq -e .usage.engine_start_ms || fail "build $id has no time: $(kiln show "$id")"
}
