# Samples and what is made of them: a file of $work for each name, one number a line.
# shellcheck shell=bash

# columns FILE NAME...: the columns of a file, appended to the samples of these names.
columns() {
  local file=$1 name at=0
  shift
  for name in "$@"; do
    at=$((at + 1))
    awk -v at="$at" '{print $at}' "$file" >>"$work/$name"
  done
}

# ratios A B: A against B for each pair, as the samples A_to_B.
ratios() {
  paste "$work/$1" "$work/$2" | awk '{printf "%.3f\n", $1 / $2}' >"$work/$1_to_$2"
}

# spread NAME [FORMAT]: minimum, median and maximum as cells.
spread() {
  sort -g "$work/$1" | awk -v f="${2:-%s}" '{v[NR] = $1} END {printf f " | " f " | " f, v[1], v[int((NR + 1) / 2)], v[NR]}'
}
