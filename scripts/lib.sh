# Shared by the scripts of this directory: where things are, installing, and telling what happens.
# shellcheck shell=bash disable=SC2034
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=${KILN_STATE:-$ROOT/.kiln}
LISTEN=${KILN_LISTEN:-127.0.0.1:4973}
TOOLS=$STATE/tools
BIN=$ROOT/target/release
LOGS=$STATE/logs
GUEST_TARGET=x86_64-unknown-linux-gnu
export PATH="$BIN:$TOOLS/bin:$PATH"

# What Kiln runs on (Debian's names), and what its tests use besides.
RUN_PACKAGES=(qemu-system-x86 docker-registry e2fsprogs skopeo)
BUILD_PACKAGES=(ca-certificates curl gcc libc6-dev make mmdebstrap erofs-utils patch zstd xz-utils)
TEST_PACKAGES=(shellcheck iproute2 jq procps busybox-static tmux python3 python3-venv podman buildah)

# The released one can leave a connection waiting for ever: see the patch.
VSOCK_DEVICE_VERSION=0.3.0
VSOCK_DEVICE_PATCHED=0.3.0+kiln.2
CARGO_DENY_VERSION=0.20.2

# say MESSAGE: a line of progress on standard error.
say() { printf '%s\n' "kiln: $*" >&2; }

# fail MESSAGE: says why, and ends.
fail() {
  say "$*"
  exit 1
}

# step TITLE COMMAND...: runs quietly, with the time it took; shows the output only when it fails. A function
# ends at its first command that fails: for that it must not be the condition of an `if`.
step() {
  local title=$1 log begun status
  shift
  mkdir -p "$LOGS"
  log=$LOGS/$(tr -c 'a-z0-9\n' - <<<"${title,,}").log
  begun=$SECONDS
  if [[ -t 2 ]]; then printf 'kiln: %s …' "$title" >&2; else say "$title …"; fi
  set +e
  (set -e; "$@") >"$log" 2>&1 </dev/null
  status=$?
  set -e
  if ((status == 0)); then
    if [[ -t 2 ]]; then
      printf '\r\033[Kkiln: %s (%s s)\n' "$title" $((SECONDS - begun)) >&2
    elif ((SECONDS - begun > 2)); then
      say "$title: done in $((SECONDS - begun)) s"
    fi
  else
    [[ -t 2 ]] && printf '\n' >&2
    tail -n 40 "$log" >&2
    fail "$title failed (exit $status). The whole output is in $log"
  fi
}

# install_packages NAME...: Debian packages, only those that are missing.
install_packages() {
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
  done
  ((${#missing[@]} == 0)) && return
  ((EUID == 0)) || fail "these Debian packages are missing: ${missing[*]}. Install them, or run this as root"
  step "Installing ${missing[*]}" apt_install "${missing[@]}"
}

apt_install() {
  local -x DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # The registry runs as a child of kiln serve: Debian's own service of it is not to start.
  local policy=/usr/sbin/policy-rc.d made=
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made=$policy
  fi
  local status=0
  apt-get install -y -qq --no-install-recommends "$@" || status=$?
  [[ -z $made ]] || rm -f "$made"
  return "$status"
}

# install_crate NAME VERSION [FLAG...]: a program from crates.io, into .kiln/tools.
install_crate() {
  local name=$1 version=$2
  shift 2
  command -v "$name" >/dev/null && "$name" --version 2>/dev/null | grep -qF "$version" && return
  step "Installing $name $version" cargo install --quiet --locked --root "$TOOLS" "$@" "$name@$version"
}

# schemathesis, which tests the API by its document, into .kiln/tools. Debian's Python: its packages are those that are
# installed.
install_schemathesis() {
  local place=$TOOLS/schemathesis wanted=$ROOT/host-shim/tests/schemathesis/requirements.txt
  cmp -s "$wanted" "$place/requirements.txt" && return
  step "Installing schemathesis" make_schemathesis "$place" "$wanted"
}

make_schemathesis() {
  local place=$1 wanted=$2
  /usr/bin/python3 -m venv --clear "$place"
  "$place/bin/pip" install --quiet --disable-pip-version-check --no-deps --requirement "$wanted"
  # Last of all: only what is whole is not made again.
  cp "$wanted" "$place/requirements.txt"
}

# hypeman's official SDKs, which use the API as its clients do, into .kiln/tools: every file by its hash. Node is whichever is
# there, as some systems have npm without a package of that name.
install_sdks() {
  local wanted=$ROOT/host-shim/tests/sdk
  if ! { command -v node && command -v npm; } >/dev/null; then install_packages nodejs npm; fi
  cmp -s "$wanted/requirements.txt" "$TOOLS/sdk-python/requirements.txt" ||
    step "Installing hypeman's SDK for Python" make_python_sdk "$TOOLS/sdk-python" "$wanted/requirements.txt"
  cmp -s "$wanted/package-lock.json" "$TOOLS/sdk-node/installed.json" ||
    step "Installing hypeman's SDK for Node" make_node_sdk "$TOOLS/sdk-node" "$wanted"
}

make_python_sdk() {
  local place=$1 wanted=$2
  /usr/bin/python3 -m venv --clear "$place"
  "$place/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    --requirement "$wanted"
  cp "$wanted" "$place/requirements.txt"
}

# The lockfile names no registry (npm's omit-lockfile-registry-resolved): the machine's settings say where packages are.
make_node_sdk() {
  local place=$1 wanted=$2
  rm -rf "$place"
  mkdir -p "$place"
  cp "$wanted"/package{,-lock}.json "$place"
  npm ci --prefix "$place" --silent --ignore-scripts --omit=optional --no-audit --no-fund
  cp "$wanted/package-lock.json" "$place/installed.json"
}

need_rust() {
  command -v cargo >/dev/null || fail "cargo is missing: install Rust 1.95 or newer (https://rustup.rs)"
}

install_to_run() {
  need_rust
  install_packages "${BUILD_PACKAGES[@]}" "${RUN_PACKAGES[@]}"
  install_vsock_device
}

install_vsock_device() {
  [[ $("$TOOLS/bin/vhost-device-vsock" --version 2>/dev/null) == *" $VSOCK_DEVICE_PATCHED" ]] && return
  step "Installing vhost-device-vsock $VSOCK_DEVICE_PATCHED" build_vsock_device
}

# The crate as it was released, with Kiln's patch. Not below this workspace, which it does not belong to.
build_vsock_device() {
  local work crate=vhost-device-vsock-$VSOCK_DEVICE_VERSION
  work=$(mktemp -d)
  mkdir "$work/src"
  printf '[package]\nname = "sources"\nversion = "0.0.0"\n[dependencies]\nvhost-device-vsock = "=%s"\n' \
    "$VSOCK_DEVICE_VERSION" >"$work/Cargo.toml"
  touch "$work/src/lib.rs"
  cargo fetch --quiet --manifest-path "$work/Cargo.toml" --target "$GUEST_TARGET"
  # One directory for each registry that was ever used.
  cp -r "$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -name "$crate" | head -n 1)" "$work/$crate"
  patch --quiet -p1 -d "$work/$crate" <"$ROOT/scripts/patches/$crate.patch"
  CARGO_TARGET_DIR=$work/target cargo install --quiet --locked --root "$TOOLS" --path "$work/$crate"
  rm -rf "$work"
}

build_programs() {
  step "Building kiln and kiln-image" \
    cargo build --release --quiet --manifest-path "$ROOT/Cargo.toml" -p kiln-host-shim -p kiln-image-tool
  step "Building the static agent" build_agent
}

# The agent is the only program of an initrd: it is linked statically.
build_agent() {
  local -x CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
  cargo build --release --quiet --manifest-path "$ROOT/Cargo.toml" -p kiln-agent --target "$GUEST_TARGET"
  # Replaced only when it changed: the builder image is made again when its agent is newer.
  local built=$ROOT/target/$GUEST_TARGET/release/kiln-agent
  cmp -s "$built" "$BIN/kiln-agent" || install -m 755 "$built" "$BIN/kiln-agent"
}

build_images() {
  step "Making the builder image" kiln-image build "$ROOT/images/builder" -o "$STATE/builder" --agent "$BIN/kiln-agent"
  step "Making the base image debian:trixie" kiln-image build "$ROOT/images/debian" -o "$STATE/debian"
}

# Publishes the base image where the server of KILN_URL has none.
base_image() {
  local image=${KILN_URL#http://}/base/debian:trixie
  inspect "$image" '{{.Digest}}' >/dev/null 2>&1 && return
  [[ -e $STATE/debian/index.json ]] || "$ROOT/scripts/quickstart" --prepare
  step "Publishing base/debian:trixie" kiln-image publish "$STATE/debian" "$image" --plain-http --creds "any:$KILN_TOKEN"
}

# inspect IMAGE FORMAT: what the registry of KILN_URL says of an image.
inspect() {
  skopeo inspect --tls-verify=false --creds "any:$KILN_TOKEN" --format "$2" "docker://$1"
}

# The pid of the kiln serve that scripts/up started, if it still runs.
serve_pid() {
  local pid start
  [[ -r $STATE/serve.pid ]] || return 1
  read -r pid start _ <"$STATE/serve.pid" || return 1
  # A pid may be somebody else's by now: the start time tells.
  [[ $(process_start "$pid") == "$start" ]] && echo "$pid"
}

# The start time of a process in clock ticks since boot (field 22 of /proc/PID/stat).
process_start() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  awk '{print $20}' <<<"${stat##*) }"
}
