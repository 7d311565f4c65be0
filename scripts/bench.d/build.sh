# A build in Kiln against the same buildah command in the same machine, without session, wrapper and host.
# shellcheck shell=bash

# build_pairs PAIRS: milliseconds of the Dockerfile's run (push apart) as the samples kiln_build and bare_build, for a
# build of some work, and as kiln_steps and bare_steps for one of nothing but short steps. Ratios of both.
build_pairs() {
  local i kind
  script_initrd
  for kind in build steps; do
    "source_of_$kind"
    bare_archive "$kind"
  done
  for ((i = 0; i < $1; i++)); do
    for kind in build steps; do
      # Each of a pair goes first in turn.
      if ((i % 2 == 0)); then
        kiln_run "$kind" >>"$work/kiln_$kind"
        script_run "$kind" >>"$work/bare_$kind"
      else
        script_run "$kind" >>"$work/bare_$kind"
        kiln_run "$kind" >>"$work/kiln_$kind"
      fi
    done
  done
  ratios kiln_build bare_build
  ratios kiln_steps bare_steps
}

# Steps that compute, read and write for seconds each, as those of a package manager or a compiler do.
source_of_build() {
  mkdir -p "$work/source-build"
  cp /bin/busybox "$work/source-build/"
  cat >"$work/source-build/Dockerfile" <<'END_OF_FILE'
FROM scratch
COPY --chmod=755 busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN head -c 40000000 /dev/zero | sha256sum >/sum
RUN mkdir /many && cd /many && for i in $(seq 1500); do echo "$i" >"$i"; done
RUN tar -C /many -c . | gzip >/many.tar.gz && rm -r /many
RUN for i in $(seq 300); do echo "line $i of a compiler, more or less as long as one of those"; done
COPY busybox /opt/busybox
RUN head -c 8000000 /dev/urandom >/random && sort /random | md5sum >/sorted; rm /random
END_OF_FILE
}

# What a step costs by itself.
source_of_steps() {
  mkdir -p "$work/source-steps"
  cp /bin/busybox "$work/source-steps/"
  {
    printf 'FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\nSHELL ["/bin/busybox", "sh", "-c"]\n'
    printf 'RUN true\n%.0s' {1..10}
  } >"$work/source-steps/Dockerfile"
}

kiln_run() {
  local id
  id=$(kiln build "$work/source-$1" --detach)
  kiln logs -f "$id" >/dev/null 2>&1
  kiln show "$id" --format json | jq -e .usage.engine_build_ms || fail "build $id has no time: $(kiln show "$id")"
}

# What the third disk holds: the source, and the script with the command line and the variables that the agent's
# golden test shows, but for its wrapper and for arguments that no build has by itself.
bare_archive() {
  local golden=$ROOT/agent/src/engine/snapshots/kiln_agent__engine__command__tests__golden.snap
  mkdir -p "$work/archive"
  rm -rf "$work/archive/source"
  cp -r "$work/source-$1" "$work/archive/source"
  printf '[storage]\ndriver = "overlay"\ngraphroot = "/var/lib/containers/storage"\nrunroot = "/run/containers/storage"\n' \
    >"$work/archive/storage.conf"
  printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' >"$work/archive/policy.json"
  printf '[containers]\nhttp_proxy = false\n' >"$work/archive/containers.conf"
  : >"$work/archive/registries.conf"
  {
    echo 'mkdir -p /var/lib/containers/tmp'
    sed -n 's/^[A-Z_]*=/export &/p' "$golden" | grep -v KILN_RUNTIME
    echo -n 'exec buildah'
    sed -n '/^build$/,/^\/build\/source$/p' "$golden" | grep -vE '^--(ignorefile|target|build-arg|secret)=' | while read -r word; do
      echo -n " '$word'"
    done
  } | sed -e 's!FILES!/var/lib/kiln!g' -e 's!/build/source!/var/lib/kiln/source!g' \
    -e 's!/run/kiln/kiln-oci-runtime!/usr/bin/crun!' >"$work/archive/script"
  script_disk "$1" "$work/archive"
}
