# The queue and the API beside bare references: host-shim/examples/bench_queue. Without a VM.
# shellcheck shell=bash

# queue_pairs PAIRS: the samples of what bench_queue prints, and their ratios. All that is stored is on the disk of $work.
queue_pairs() {
  local kind
  step "Building the benchmark of the queue" \
    cargo build --release --quiet --manifest-path "$ROOT/Cargo.toml" -p kiln-host-shim --example bench_queue
  for kind in submits claims followers lists; do
    mkdir -p "$work/queue/$kind"
    step "Measuring $1 pairs: $kind" queue_run "$kind" "$1"
  done
  columns "$work/queue/submits.pairs" kiln_submits bare_submits
  columns "$work/queue/claims.pairs" kiln_claims bare_claims
  columns "$work/queue/followers.pairs" kiln_follow_cpu bare_follow_cpu follower_kib follow_p99 stalled_p99 bare_p99
  columns "$work/queue/lists.pairs" list_100 list_10000 status_100 status_10000 tag_100 tag_10000 get_100 get_10000
  ratios kiln_submits bare_submits
  ratios kiln_claims bare_claims
  ratios kiln_follow_cpu bare_follow_cpu
  ratios stalled_p99 follow_p99
  for kind in list status tag get; do
    ratios "${kind}_10000" "${kind}_100"
  done
  rm -rf "$work/queue"
}

queue_run() {
  "$BIN/examples/bench_queue" "$1" "$2" "$work/queue/$1" >"$work/queue/$1.pairs"
}
