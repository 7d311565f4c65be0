# A gigabyte through a command's standard input and output, against the same bytes over the same VM's bare vsock.
# shellcheck shell=bash

ECHO_PORT=7000
ECHO_BYTES=$((1 << 30))

# exec_pairs PAIRS: milliseconds as the samples exec_cat, bare_cat and bare_echo, and the ratios of bare to Kiln.
exec_pairs() {
  local i instance running serving
  # Nothing of it repeats: bytes in another order do not pass for the same.
  head -c "$ECHO_BYTES" /dev/urandom >"$work/gigabyte"
  kiln run base/debian:trixie -- sleep infinity &
  running=$!
  until [[ $(kiln instances ls --format json | jq -r '.[0].state') == Running ]]; do sleep 0.2; done
  instance=$(kiln instances ls --format json | jq -r '.[0].id')
  kiln cp --vm "$GUEST_EXAMPLES/bench_echo" "$instance:/run/bench_echo"
  kiln exec --vm "$instance" -- /run/bench_echo serve "$ECHO_PORT" >"$work/serving" &
  serving=$!
  until grep -q listening "$work/serving"; do sleep 0.05; done
  for ((i = 0; i < $1; i++)); do
    # Who goes first changes from pair to pair.
    if ((i % 2 == 0)); then
      bare_bytes echo >>"$work/bare_echo"
      exec_bytes "$instance" >>"$work/exec_cat"
      bare_bytes cat >>"$work/bare_cat"
    else
      bare_bytes cat >>"$work/bare_cat"
      exec_bytes "$instance" >>"$work/exec_cat"
      bare_bytes echo >>"$work/bare_echo"
    fi
  done
  kiln instances rm "$instance"
  # Both end with it.
  wait "$running" "$serving" || true
  rm "$work/gigabyte"
  ratios bare_cat exec_cat
  ratios bare_echo exec_cat
}

exec_bytes() {
  local begun=$EPOCHREALTIME
  kiln exec -i "$1" -- cat <"$work/gigabyte" | cmp - "$work/gigabyte" || fail "the bytes did not come back as they went"
  echo $(((${EPOCHREALTIME/./} - ${begun/./}) / 1000))
}

# The only VM of this server.
bare_bytes() {
  local socket
  socket=$(find /run/kiln -type s -path "*/$instance/*" -name v)
  "$GUEST_EXAMPLES/bench_echo" drive "$socket" "$ECHO_PORT" "$1" "$ECHO_BYTES"
}
