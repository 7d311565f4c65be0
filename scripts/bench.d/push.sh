# Pushes through the registry gateway against pushes straight to its registry. Without a VM.
# shellcheck shell=bash

# push_pairs PAIRS: milliseconds of the requests of a push as the samples straight_push and gateway_push, of the same image once
# more as straight_again and gateway_again, those of skopeo as straight_skopeo and gateway_skopeo, and their ratios.
push_pairs() {
  step "Building the benchmark of pushes" \
    cargo build --release --quiet --manifest-path "$ROOT/Cargo.toml" -p kiln-host-shim --example bench_push
  step "Measuring $1 pairs: pushes" push_requests "$1"
  columns "$work/push.pairs" straight_push gateway_push straight_again gateway_again
  ratios gateway_push straight_push
  ratios gateway_again straight_again
  step "Measuring $1 pairs: pushes by skopeo" skopeo_pairs "$1"
  ratios gateway_skopeo straight_skopeo
}

# The registry that kiln serve runs, by the socket that Kiln uses.
push_requests() {
  "$BIN/examples/bench_push" requests "$1" "$STATE/data/registry" "$KILN_LISTEN" >"$work/push.pairs"
}

# skopeo knows no sockets of that kind: docker-registry with the same settings on a port, and a Kiln of its own before it.
# In a shell of its own, which takes its processes along.
skopeo_pairs() {
  local registry=127.0.0.1:4976 i exports
  export KILN_STATE=$work/skopeo/kiln KILN_LISTEN=127.0.0.1:4977 KILN_REGISTRY=http://$registry
  mkdir -p "$KILN_STATE"
  ln -s "$STATE"/{builder,debian,tools} "$KILN_STATE"
  sed -e 's/net: unix/net: tcp/' -e "s|addr: .*|addr: $registry|" "$STATE/data/registry/config.yml" >"$work/skopeo/config.yml"
  (cd "$work/skopeo" && exec docker-registry serve config.yml) &
  registry_pid=$!
  trap '"$ROOT/scripts/down"; kill "$registry_pid"' EXIT
  until curl -fsS "http://$registry/v2/" >/dev/null 2>&1; do
    kill -0 "$registry_pid"
    sleep 0.05
  done
  exports=$("$ROOT/scripts/up")
  eval "$exports"
  for ((i = 0; i < $1; i++)); do
    # Who goes first changes from pair to pair.
    if ((i % 2 == 0)); then
      skopeo_push "$registry" "$i" >>"$work/straight_skopeo"
      skopeo_push "$KILN_LISTEN" "$i" >>"$work/gateway_skopeo"
    else
      skopeo_push "$KILN_LISTEN" "$i" >>"$work/gateway_skopeo"
      skopeo_push "$registry" "$i" >>"$work/straight_skopeo"
    fi
  done
}

# skopeo_push HOST:PORT PAIR: milliseconds for a fresh image into a repository of its own.
skopeo_push() {
  local begun login=()
  [[ $1 != "$KILN_LISTEN" ]] || login=(--dest-creds "any:$KILN_TOKEN")
  "$BIN/examples/bench_push" layout "$work/layout"
  begun=$EPOCHREALTIME
  skopeo --insecure-policy copy --quiet --preserve-digests --dest-tls-verify=false "${login[@]}" \
    "oci:$work/layout:image" "docker://$1/dev/bench-skopeo-${1##*:}-$2:v1" >&2
  echo $(((${EPOCHREALTIME/./} - ${begun/./}) / 1000))
  rm -rf "$work/layout" "$work/skopeo/storage/docker"
}

push_rows() {
  cat <<END
| a push of 128 MiB through the registry gateway, against one straight to the same registry, by skopeo (ratio of pairs) | ≤ 1.3 | $(spread gateway_skopeo_to_straight_skopeo %.2f) |
| the same, through the gateway, ms | | $(spread gateway_skopeo) |
| the same, straight, ms | | $(spread straight_skopeo) |
| the same requests by a client that costs next to nothing (ratio of pairs) | ≤ 1.3 | $(spread gateway_push_to_straight_push %.2f) |
| the same, through the gateway, ms | | $(spread gateway_push) |
| the same, straight, ms | | $(spread straight_push) |
| the same image once more, of which no blob is sent (ratio of pairs) | | $(spread gateway_again_to_straight_again %.2f) |
| the same, through the gateway, ms | | $(spread gateway_again) |
| the same, straight, ms | | $(spread straight_again) |
END
}
