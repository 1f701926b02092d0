#!/usr/bin/env bash
# Includes go one way. Reads every source file under kernels/, services/, worker/ and tests/, and fails on an include
# that is not in the table below (the one table of the design), on a system that a folder must not see (gRPC, protobuf, CUDA), on
# an include that is not written from the top of the tree, and on a file beyond its size budget.
# usage: layering_test.sh [ROOT]        checks the tree at ROOT (default: this one)
#        layering_test.sh --self-test   proves that each rule can fail, on made-up trees
set -euo pipefail

# folder | what its files may include besides the folder itself. The longest matching folder counts; a file name stands
# for itself. core/check.h, core/status_macros.h and core/fault_point.h are open to all: they depend on nothing.
table() {
  cat << 'TABLE'
kernels/core         |
kernels/quant        | kernels/core
kernels/sampling     | kernels/core
kernels/backend_types | kernels/core
kernels/backend      | kernels/backend_types kernels/core kernels/quant kernels/sampling
kernels/cpu          | kernels/core kernels/quant kernels/sampling kernels/backend
kernels/cuda         | kernels/core kernels/quant kernels/sampling kernels/backend
services/rpc         | proto
services/metrics     |
services/text        | proto
services/checkpoint  | proto kernels/core kernels/quant
services/convert     | proto services/text services/checkpoint kernels/core kernels/quant
services/plan        | proto kernels/core kernels/quant services/checkpoint/hf_config.h
services/controller  | proto services/rpc services/metrics services/text services/plan
services/loader      | proto services/rpc services/metrics services/checkpoint kernels/core kernels/quant
services/gateway     | proto services/rpc
services/cli         | proto services/rpc services/text services/checkpoint services/convert services/plan
worker/engine        | proto/sluice/internal kernels/core kernels/quant kernels/sampling kernels/backend
worker               | proto services/rpc services/metrics worker/engine kernels/core kernels/quant kernels/sampling kernels/backend
tests/kernels/cpu    | tests/support kernels/core kernels/quant kernels/sampling kernels/backend kernels/cpu
tests/kernels/cuda   | tests/support kernels/core kernels/quant kernels/sampling kernels/backend kernels/cpu kernels/cuda
tests/kernels        | tests/support kernels
tests/worker         | tests/support proto services/rpc services/metrics services/checkpoint worker kernels
tests/services       | tests/support proto services kernels/core kernels/quant
tests/support        | proto services worker kernels
tests/containers     | tests/support tests/services/checkpoint tests/worker/engine services/checkpoint worker/engine kernels/core kernels/quant kernels/backend
tests/e2e            | tests/support proto services/rpc
tests/kill_matrix    | tests/support tests/e2e proto services/rpc
tests/bench          | tests/support tests/e2e proto services worker kernels
tests/load           | proto
tests/fuzz           | tests/services/checkpoint proto services worker kernels
tests/bad_files      | tests/services/checkpoint tests/fuzz proto services kernels
TABLE
}

# system headers (a pattern of what stands between the quotes or brackets) | folders that may see them | the reason
systems() {
  cat << 'SYSTEMS'
^grpcpp/|^grpc/|^grpc\+\+/|[.]grpc[.]pb[.]h$ | services/rpc services/controller services/loader services/gateway services/cli worker tests/worker tests/services tests/support tests/e2e tests/kill_matrix tests/bench | gRPC belongs to the shells of the services and of the worker
[.]pb[.]h$|^google/protobuf/ | services worker tests/worker tests/services tests/support tests/e2e tests/kill_matrix tests/bench tests/load tests/fuzz | kernels know no messages
^cuda|^cublas|^cooperative_groups|^mma[.]h$|^nvml|^device_launch|^driver_types | kernels/cuda tests/kernels/cuda | only kernels/cuda knows CUDA
^prometheus/ | services/metrics | only services/metrics knows prometheus-cpp
SYSTEMS
}
# Folders inside a permitted one that are excluded again.
readonly NO_GRPC=worker/engine

# name pattern | most lines
budgets() {
  cat << 'BUDGETS'
^tests/.*[.](cc|cu|h)$ | 500
[.]h$ | 200
[.]cuh$ | 200
[.]cc$ | 400
[.]cu$ | 600
BUDGETS
}

# check ROOT: prints each violation as file:line: text; status 1 when there is one, 2 when there is nothing to check.
check() {
  cd "$1"
  local files folders=() folder
  for folder in kernels services worker tests; do [ ! -d "$folder" ] || folders+=("$folder"); done
  [ ${#folders[@]} -gt 0 ] || { echo "no sources under $1"; return 2; }
  files=$(find "${folders[@]}" -type f \( -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \) \
    -not -path '*/target/*' -not -path '*/testdata/*' | sort)
  [ -n "$files" ] || { echo "no sources under $1"; return 2; }
  awk -v no_grpc=$NO_GRPC '
    function trim(text) { gsub(/^ +| +$/, "", text); return text }
    # The path lies in the folder (or is the file), or begins with it as a file stem: kernels/quant covers kernels/quant.h.
    function within(path, folder) {
      return substr(path, 1, length(folder)) == folder && (path == folder || substr(path, length(folder) + 1, 1) ~ /[\/.]/)
    }
    function row_of(path,    folder, best) {
      for (folder in may) if (within(path, folder) && length(folder) > length(best)) best = folder
      return best
    }
    function any_within(path, list,    i, n, item) {
      n = split(list, item, " ")
      for (i = 1; i <= n; i++) if (within(path, item[i])) return 1
      return 0
    }
    function complain(text) { print FILENAME ":" FNR ": " text; bad++ }
    function check_system(target,    i) {
      for (i = 1; i <= num_systems; i++)
        if (target ~ system_pattern[i] &&
            (!any_within(FILENAME, system_folders[i]) || (i == 1 && within(FILENAME, no_grpc))))
          complain("includes " target ": " system_reason[i])
    }
    function check_edge(target,    from) {
      from = row_of(FILENAME)
      if (from == "") { complain("lies in no folder of the table in tests/layering_test.sh"); return }
      if (target ~ /^kernels\/core\/(check|status_macros|fault_point)[.]h$/) return
      if (row_of(target) == from || any_within(target, may[from])) return
      complain("includes " target ", but " from " may include only: " from " " may[from])
    }
    FNR == NR && section == 0 && /^==/ { section = 1; next }
    FNR == NR && section == 1 && /^==/ { section = 2; next }
    FNR == NR {  # The rules come first
     
      if (section == 0) { split($0, part, "|"); may[trim(part[1])] = trim(part[2]) }
      if (section == 1) {
        n = split($0, part, " \\| "); num_systems++
        system_pattern[num_systems] = part[1]; system_folders[num_systems] = part[2]; system_reason[num_systems] = part[3]
      }
      if (section == 2) { split($0, part, " \\| "); budget_pattern[++num_budgets] = part[1]; budget_lines[num_budgets] = part[2] }
      next
    }
    FNR == 1 { close_file(); current = FILENAME; seen++ }
    { lines = FNR }
    function close_file(    i) {
      if (current == "") return
      for (i = 1; i <= num_budgets; i++)
        if (current ~ budget_pattern[i]) {
          if (lines > budget_lines[i]) { print current ": " lines " lines, budget " budget_lines[i] ": split it"; bad++ }
          return
        }
    }
    /^[ \t]*#[ \t]*include[ \t]*["<]/ {
      target = $0
      sub(/^[ \t]*#[ \t]*include[ \t]*["<]/, "", target); sub(/[">].*/, "", target)
      check_system(target)
      if (target ~ /^(kernels|services|worker|proto|tests)\//) check_edge(target)
      else if (target ~ /^sluice\/|^\.\.?\// || (/"/ && target !~ /\//))
        complain("includes \"" target "\": write it from the top of the tree")
    }
    END {
      close_file()
      if (!seen) { print "no file was read"; exit 2 }
      printf "%d files, %d violations\n", seen, bad
      exit bad > 0
    }' <(table | sed '/^$/d'; echo ==; systems; echo ==; budgets) $files
}

# --- Self-test: a rule that cannot fail is no rule ----------------------------------------------------------------

# must_fail FILE TEXT WORD: a sound tree with TEXT in FILE is refused, and the message holds FILE and WORD.
must_fail() {
  local root report
  root=$(mktemp -d)
  make_sound_tree "$root"
  mkdir -p "$root/$(dirname "$1")"
  printf '%b\n' "$2" >> "$root/$1"
  if report=$(check "$root"); then echo "NOT refused: $2 in $1"; failures=$((failures + 1))
  elif [[ $report != *"$1"*"$3"* ]]; then echo "refused for another reason: ${2:0:60} in $1: $report"; failures=$((failures + 1))
  else echo "refused, as it must be: ${2:0:60} in $1"
  fi
  rm -rf "$root"
}

make_sound_tree() {
  mkdir -p "$1"/kernels/{core,cpu,cuda} "$1"/services/{rpc,controller} "$1"/worker/engine "$1"/tests/kernels/cpu
  echo '#include <vector>' > "$1/kernels/core/tensor.h"
  echo '#include "kernels/core/tensor.h"' > "$1/kernels/backend.h"
  echo '#include "kernels/backend.h"' > "$1/kernels/cpu/norm.cc"
  echo '#include <cuda_runtime.h>' > "$1/kernels/cuda/norm.cu"
  printf '#include <grpcpp/grpcpp.h>\n#include "proto/sluice/v1/generation.grpc.pb.h"\n' > "$1/services/controller/main.cc"
  printf '#include "worker/engine/shard.h"\n#include "services/rpc/channel.h"\n#include <grpcpp/grpcpp.h>\n' > "$1/worker/main.cc"
  printf '#include "kernels/backend.h"\n#include "proto/sluice/internal/v1/shard.pb.h"\n' > "$1/worker/engine/shard.h"
  printf '#include "kernels/backend.h"\n#include "gtest/gtest.h"\n' > "$1/tests/kernels/cpu/norm_test.cc"
}

self_test() {
  failures=0
  local root
  root=$(mktemp -d); make_sound_tree "$root"
  if (check "$root"); then :; else echo "the sound tree was refused"; failures=1; fi
  rm -rf "$root"
  must_fail kernels/core/tensor.h '#include "kernels/backend.h"' "may include only"
  must_fail kernels/cpu/norm.cc '#include "kernels/cuda/norm.h"' "may include only"
  must_fail kernels/cpu/norm.cc '#include "worker/engine/shard.h"' "may include only"
  must_fail services/rpc/channel.h '#include "services/controller/scheduler.h"' "may include only"
  must_fail services/controller/main.cc '#include "worker/engine/shard.h"' "may include only"
  must_fail services/controller/main.cc '#include "services/loader/shard_source.h"' "may include only"
  must_fail worker/engine/shard.h '#include "services/rpc/channel.h"' "may include only"
  must_fail worker/engine/shard.h '#include "worker/attach_client.h"' "may include only"
  must_fail worker/engine/shard.h '#include "proto/sluice/v1/generation.pb.h"' "may include only"
  must_fail worker/engine/shard.h '  #  include <grpcpp/channel.h>' "gRPC belongs"
  must_fail services/plan/device_map.cc '#include <grpcpp/channel.h>' "gRPC belongs"
  must_fail kernels/cpu/norm.cc '#include <google/protobuf/message.h>' "no messages"
  must_fail kernels/cpu/norm.cc '#include "proto/sluice/internal/v1/shard.pb.h"' "no messages"
  must_fail kernels/cpu/norm.cc '#include <cuda_fp16.h>' "knows CUDA"
  must_fail worker/main.cc '#include <prometheus/counter.h>' "knows prometheus-cpp"
  must_fail worker/engine/shard.h '#include "services/metrics/page.h"' "may include only"
  must_fail services/metrics/page.h '#include "services/rpc/log.h"' "may include only"
  must_fail kernels/cpu/norm.cc '#include "norm.h"' "top of the tree"
  must_fail kernels/cpu/norm.cc '#include "../core/tensor.h"' "top of the tree"
  must_fail kernels/other/x.h '#include "kernels/backend.h"' "no folder of the table"
  must_fail kernels/core/long.h "$(printf '// x\\n%.0s' {1..201})" "budget 200"
  must_fail kernels/core/long.cc "$(printf '// x\\n%.0s' {1..401})" "budget 400"
  must_fail tests/kernels/cpu/long_test.cc "$(printf '// x\\n%.0s' {1..501})" "budget 500"
  [ $failures -eq 0 ] || { echo "$failures rules cannot fail"; exit 1; }
  echo "every rule can fail"
}

if [ "${1:-}" = --self-test ]; then self_test; else check "${1:-$(dirname "${BASH_SOURCE[0]}")/..}"; fi
