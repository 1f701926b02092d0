#!/usr/bin/env bash
# The programs of a build without SLUICE_FAULT_POINTS hold no fault point and no word of how to choose one; and the matrix
# (points.cc) names every point that the sources have, and no other.
# usage: fault_points_test.sh BIN_FOLDER             a build without fault points
#        fault_points_test.sh --present BIN_FOLDER   one with them: each point is in its program, so the search above can find them
set -euo pipefail
readonly ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly PROGRAMS=(sluice-controller sluice-loader sluice-worker)
present=0
if [ "${1:-}" = --present ]; then present=1; shift; fi
readonly BIN=${1:?folder of the built programs}

fail() { echo "FAILED: $*"; exit 1; }

sources=$(grep -rhoE --include='*.cc' --include='*.h' 'SLUICE_FAULT_POINT\("[a-z_.]+"\)' "$ROOT"/{services,worker,kernels} |
  grep -v worker.after_compute | sed 's/.*("\(.*\)").*/\1/' | sort)
# worker.after_compute is also the example in kernels/core/fault_point.h.
sources=$(printf '%s\nworker.after_compute\n' "$sources" | sort)
[ -z "$(uniq -d <<< "$sources")" ] || fail "a point is in two places: $(uniq -d <<< "$sources")"
matrix=$(sed -n 's/^ *{"\([a-z_.]*\)".*/\1/p' "$ROOT/tests/kill_matrix/points.cc" | sort)
[ "$sources" = "$matrix" ] || fail "points of the sources (<) and of points.cc (>):" "$(diff <(echo "$sources") <(echo "$matrix"))"
for role in controller loader worker; do
  [ "$(grep -c "^$role\." <<< "$sources")" -ge 8 ] || fail "fewer than 8 points in the $role"
done

for program in "${PROGRAMS[@]}"; do
  [ -s "$BIN/$program" ] || fail "$BIN/$program is not built"
  for word in SLUICE_FAULT fault_point $(grep "^${program#sluice-}\." <<< "$sources"); do
    if grep -qaF -- "$word" "$BIN/$program"; then found=1; else found=0; fi
    [ $found -eq $present ] || fail "\"$word\" in $program: found $found, expected $present"
  done
done
echo "$(wc -l <<< "$sources") points; in the programs: $([ $present -eq 1 ] && echo all || echo none)"
