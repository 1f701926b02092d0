#!/usr/bin/env bash
# Can the tests fail? Plants known mistakes one at a time in a copy of HEAD, builds, and demands that tests turn red.
# usage: tests/mutations.sh        by hand, after ./dev test; 10 minutes. Prints a line for each mistake; exit code 1 when one survives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${SLUICE_MODEL:=${SLUICE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sluice}/models/SmolLM2-135M-Instruct.Q4_1.gguf}"
export SLUICE_MODEL

readonly TESTS='format_.*_test|convert_(int4|bnb|convert)_test|golden_test|engine_test|engine_step_test|default_model_test'
readonly TARGETS=(convert_int4_test convert_bnb_test convert_convert_test format_awq_test format_bnb_test format_gguf_test format_gptq_test golden_test engine_test engine_step_test
  default_model_test)

work=$(mktemp -d)
trap 'git worktree remove --force "$work/tree"; rm -rf "$work"' EXIT
git worktree add -q --detach "$work/tree" HEAD
cd "$work/tree"
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1

build_and_test() {
  ninja -C build "${TARGETS[@]}" > "$work/build.log" 2>&1 || { tail -20 "$work/build.log"; echo "it does not compile"; exit 1; }
  ctest --test-dir build -R "^($TESTS)$" --timeout 300 > "$work/test.log" 2>&1
}
red_tests() { sed -n 's/^[[:space:]]*[0-9]* - \([a-z0-9_]*\) (.*/\1/p' "$work/test.log" | paste -sd ' '; }

survivors=0
# mistake NAME FILE SED-EXPRESSION
mistake() {
  sed -i "$3" "$2"
  git diff --quiet && { echo "$1: the line is not there any more in $2"; exit 1; }
  if build_and_test; then
    echo "SURVIVES  $1"
    survivors=$((survivors + 1))
  else
    echo "found     $1: $(red_tests)"
  fi
  git checkout -q -- "$2"
}

cmake -S . -B build -G Ninja > "$work/build.log" 2>&1
build_and_test || { cat "$work/test.log"; echo "red before any mistake"; exit 1; }

readonly FORMATS=services/checkpoint
mistake "GPTQ v1 zero point without its + 1" $FORMATS/format_gptq.cc 's/packed_zeros_ ? 0 : 1;/packed_zeros_ ? 0 : 0;/; s/packed_zeros_ ? 0x11111111U : 0;/0;/'
mistake "GPTQ v2 zero point with v1's + 1" $FORMATS/format_gptq.cc 's/zero_is_true_ || packed_zeros_ ? 0 : 1;/packed_zeros_ ? 0 : 1;/'
mistake "GPTQ act-order forgotten" $FORMATS/format_gptq.cc 's/const int32_t to = position\[kPerWord \* word + i\];/const int64_t to = kPerWord * word + i;/'
mistake "AWQ nibbles in natural order" $FORMATS/format_awq.cc 's/{0, 4, 1, 5, 2, 6, 3, 7}/{0, 1, 2, 3, 4, 5, 6, 7}/'
mistake "bitsandbytes nibbles not swapped" $FORMATS/format_bnb.cc 's/source\[i\] << 4 | source\[i\] >> 4/source[i]/; s/element % 2 == 0 ? byte/element % 2 != 0 ? byte/'
mistake "GGUF halves of a block not interleaved" $FORMATS/format_gguf.cc 's/to\[i + 8\] = .*/to[i + 8] = from[i + 8];/'
mistake "GGUF rows of q and k left as they lie" $FORMATS/format_gguf.cc 's/if (rows_per_head == 0) return row;/if (rows_per_head >= 0) return row;/'
mistake "bias of q, k, v and of the first MLP product missing" kernels/cpu/cpu_backend.cc 's/Multiply(Normalized(norm, x, {}), linear, {y.Row(0), y.stride, bias, act/Multiply(Normalized(norm, x, {}), linear, {y.Row(0), y.stride, nullptr, act/'
mistake "bias of the products that add to the residual missing" kernels/cpu/cpu_backend.cc 's/{residual.Row(0), residual.stride, bias,/{residual.Row(0), residual.stride, nullptr,/'
mistake "rope turns the other way" kernels/cpu/rope.cc 's/a \* cos\[i\] - b \* sin\[i\]/a * cos[i] + b * sin[i]/; s/b \* cos\[i\] + a \* sin\[i\]/b * cos[i] - a * sin[i]/'
mistake "OPT positions without their + 2" worker/engine/decoder_layer.h 's/\(constexpr uint32_t kOpt[A-Za-z]* = \)2;/\10;/'
mistake "nested absmax without its offset" $FORMATS/format_bnb.cc 's/= product + offset;/= product;/'
mistake "AWQ zero points plus 1" $FORMATS/format_awq.cc 's/static_cast<uint8_t>(ValueAt(word, row % kPerWord))/static_cast<uint8_t>(ValueAt(word, row % kPerWord) + 1)/'
readonly CONVERT=services/convert
mistake "written AWQ nibbles in natural order" $CONVERT/int4.cc 's/{0, 4, 1, 5, 2, 6, 3, 7}/{0, 1, 2, 3, 4, 5, 6, 7}/'
mistake "written GPTQ v1 zeros without their - 1" $CONVERT/convert.cc 's/zeros_minus_one=\*\/options_.symmetric/zeros_minus_one=*\/false/'
mistake "codes chosen with another scale than the written one" $CONVERT/int4.cc 's/const float scale = HalfToFloat(group.scale);/const float scale = (max - min) \/ kMaxCode;/'
mistake "bitsandbytes blocks that do not go on in the next slab" $CONVERT/bnb.cc 's/    held -= taken;/    held = 0;/'
mistake "written AWQ without zero points" $CONVERT/convert.cc 's/\/\*symmetric=\*\/false/true/'
exit $((survivors > 0))
