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

# Their rows of the table.
queue_rows() {
  cat <<END
| durable submits at 32 clients, rate against a bare handler's that makes the same bytes durable (ratio of pairs) | ≥ 0.5 | $(spread kiln_submits_to_bare_submits %.2f) |
| the same, Kiln, submits a second | | $(spread kiln_submits %.0f) |
| the same, bare, submits a second | | $(spread bare_submits %.0f) |
| claim + end of a build, rate against the bare statements' (ratio of pairs) | ≥ 0.7 | $(spread kiln_claims_to_bare_claims %.2f) |
| the same, Kiln, builds a second | | $(spread kiln_claims %.0f) |
| the same, bare, builds a second | | $(spread bare_claims %.0f) |
| 1,000 followers of one build: CPU of the server against a bare loop's that writes the same bytes to as many sockets (ratio of pairs) | ≤ 2 | $(spread kiln_follow_cpu_to_bare_follow_cpu %.2f) |
| the same, Kiln, ms | | $(spread kiln_follow_cpu) |
| the same, bare loop, ms | | $(spread bare_follow_cpu) |
| the same, a follower, KiB resident | < 20 | $(spread follower_kib %.1f) |
| the same, from the order to store a batch until a follower has it, p99, with one more follower that reads nothing, against without (ratio of pairs) | ≤ 1.2 | $(spread stalled_p99_to_follow_p99 %.2f) |
| the same, without it, µs | | $(spread follow_p99) |
| the same, with it, µs | | $(spread stalled_p99) |
| the same, bare loop, µs | | $(spread bare_p99) |
| a page of 50 builds, with 10,000 finished builds in the store against 100 (ratio of medians) | ≤ 1.2 | $(spread list_10000_to_list_100 %.2f) |
| a page by status | ≤ 1.2 | $(spread status_10000_to_status_100 %.2f) |
| a page by tag | ≤ 1.2 | $(spread tag_10000_to_tag_100 %.2f) |
| one build | ≤ 1.2 | $(spread get_10000_to_get_100 %.2f) |
| a page of 50, with 10,000, µs | | $(spread list_10000) |
| one build, with 10,000, µs | | $(spread get_10000) |
END
}
