# postcard's frames against JSON, on the events of a build that Kiln has made.
# shellcheck shell=bash

# codec_pairs BUILD PAIRS: samples of nanoseconds an event and bytes an event, and their ratios.
codec_pairs() {
  step "Building the codec benchmark" \
    cargo build --release --quiet --manifest-path "$ROOT/Cargo.toml" -p kiln-protocol --example codec
  curl --silent --fail --no-buffer --max-time 60 -H "Authorization: Bearer $KILN_TOKEN" \
    "http://$KILN_LISTEN/builds/$1/events" | sed -n 's/^data: *//p' >"$work/events"
  "$BIN/examples/codec" "$work/events" "$2" >"$work/codec-pairs"
  columns "$work/codec-pairs" postcard_encode json_encode postcard_decode json_decode postcard_bytes json_bytes
  ratios postcard_encode json_encode
  ratios postcard_decode json_decode
  ratios postcard_bytes json_bytes
}
