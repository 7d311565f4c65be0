# What the search for secrets in an image costs, of the time from the push's begin to the publication.
# shellcheck shell=bash

# leak_pairs PAIRS: milliseconds as the samples push_searched, push_searched_long and push_unsearched, and the ratios to
# the last.
leak_pairs() {
  local i
  mkdir -p "$work/large"
  # Half of it packs well, as texts and programs do, and half does not at all.
  head -c 50000000 /dev/urandom >"$work/large/random"
  seq 6400000 >"$work/large/numbers"
  printf 'FROM scratch\nCOPY random numbers /\n' >"$work/large/Dockerfile"
  # A token, for whose forms the fastest search is built, and a key store, for whose forms that one would be too large.
  head -c 30 /dev/urandom | base64 >"$work/push_searched.secret"
  head -c 6000 /dev/urandom | base64 -w 0 >"$work/push_searched_long.secret"
  local kinds=(push_unsearched push_searched push_searched_long) kind
  for ((i = 0; i < $1; i++)); do
    # Who goes first changes from pair to pair.
    for kind in "${kinds[@]:i % 3}" "${kinds[@]:0:i % 3}"; do
      push_run "$kind" >>"$work/$kind"
    done
  done
  ratios push_searched push_unsearched
  ratios push_searched_long push_unsearched
}

# push_run KIND. A build without secrets is not searched.
push_run() {
  local id secret=()
  [[ ! -e $work/$1.secret ]] || secret=(--secret "id=bench,src=$work/$1.secret")
  id=$(kiln build "$work/large" --detach "${secret[@]}")
  kiln logs -f "$id" >/dev/null 2>&1
  curl -fsS -H "Authorization: Bearer $KILN_TOKEN" "$KILN_URL/builds/$id/events" | sed -n 's/^data: //p' |
    jq -rs 'map(select(.type == "status")) | map({(.status): .timestamp}) | add |
      def ms: (.[0:19] + "Z" | fromdate) * 1000 + (.[20:23] | tonumber);
      (.ready | ms) - (.pushing | ms)' || fail "build $id did not end well: $(kiln show "$id")"
}
