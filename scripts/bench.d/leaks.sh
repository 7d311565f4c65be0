# What the search for secrets in an image costs, of the time from the push's begin to the publication.
# shellcheck shell=bash

# leak_pairs PAIRS: milliseconds as the samples push_searched and push_unsearched, and their ratio.
leak_pairs() {
  local i
  mkdir -p "$work/large"
  # Half of it packs well, as texts and programs do, and half does not at all.
  head -c 50000000 /dev/urandom >"$work/large/random"
  seq 6400000 >"$work/large/numbers"
  printf 'FROM scratch\nCOPY random numbers /\n' >"$work/large/Dockerfile"
  head -c 30 /dev/urandom | base64 >"$work/secret"
  for ((i = 0; i < $1; i++)); do
    if ((i % 2 == 0)); then
      push_run --secret "id=bench,src=$work/secret" >>"$work/push_searched"
      push_run >>"$work/push_unsearched"
    else
      push_run >>"$work/push_unsearched"
      push_run --secret "id=bench,src=$work/secret" >>"$work/push_searched"
    fi
  done
  ratios push_searched push_unsearched
}

# A build without secrets is not searched.
push_run() {
  local id
  id=$(kiln build "$work/large" --detach "$@")
  kiln logs -f "$id" >/dev/null 2>&1
  curl -fsS -H "Authorization: Bearer $KILN_TOKEN" "$KILN_URL/builds/$id/events" | sed -n 's/^data: //p' |
    jq -rs 'map(select(.type == "status")) | map({(.status): .timestamp}) | add |
      def ms: (.[0:19] + "Z" | fromdate) * 1000 + (.[20:23] | tonumber);
      (.ready | ms) - (.pushing | ms)' || fail "build $id did not end well: $(kiln show "$id")"
}
