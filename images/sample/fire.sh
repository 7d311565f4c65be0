#!/bin/sh
# Turns a picture into a program that shows it.
set -eu

lines=$(wc -l < "$1")
echo "firing $1, $lines lines" >&2

echo '#!/bin/sh'
echo "cat <<'END'"
cat "$1"
echo 'END'
echo 'echo "fresh from the kiln: $(cat /etc/kiln-sample 2>/dev/null || echo still warm)"'
