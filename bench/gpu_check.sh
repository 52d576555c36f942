#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 9 minutes: builds the checkout into a temporary folder, runs
# the GPU tests, compute-sanitizer and the benches, and writes one report, gpu-<name>.md, into $OUT or bench/results.
#
#     bench/gpu_check.sh
#
# Nothing is installed or downloaded. Wanted on the machine: python3 with torch (CUDA), transformers, pytest,
# hypothesis, pybind11 and scikit-build-core; cmake, ninja, nvcc; compute-sanitizer and cuobjdump where they are to be
# used. A stage that fails or takes too long is recorded, and the next one runs; the exit status is 1 then.
# GPU_CHECK_DRY=1 goes through the stages without a GPU, on CPU tensors, to try this script itself.
set -uo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
device=cuda tests="cuda and not emulated or a_gpu_holds"

if [ -n "${GPU_CHECK_DRY:-}" ]; then
  device=cpu tests="worked_out_by_hand" gpu="dry run without a GPU"
else
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null || gpu=
  if [ -z "$gpu" ]; then
    echo "gpu_check.sh: no GPU that nvidia-smi and torch can use; nothing was done" >&2
    exit 1
  fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "${OUT:-$checkout/bench/results}"
results=$(cd "${OUT:-$checkout/bench/results}" && pwd)
report=$results/gpu-$(tr -cs 'A-Za-z0-9\n' - <<< "$gpu" | tr 'A-Z' 'a-z').md
failed=0
export PYTHONPATH=$work/site PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '%s\n' "$*" >> "$report"; }

# stage NAME SECONDS COMMAND...: its output into $work/NAME.log, one row into the report. The output's last lines are
# kept for the end of the report where the stage did not succeed.
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 verdict=ok summary
  shift 2
  printf '=== %s (at most %s s)\n' "$name" "$limit"
  timeout -k 5 "$limit" "$@" > "$work/$name.log" 2>&1 || status=$?
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    verdict="**out of time**"
  elif [ "$status" != 0 ]; then
    verdict="**failed ($status)**"
  fi
  if [ "$status" != 0 ]; then
    failed=1
    { printf '\n%s, last lines:\n\n```\n' "$name"; tail -n 40 "$work/$name.log"; printf '```\n'; } >> "$work/failures"
  fi
  summary=$(grep -E "ERROR SUMMARY|RACECHECK SUMMARY|[0-9]+ (passed|failed|error)|every operation agrees|^compute capabilities" \
    "$work/$name.log" | sed 's/^=* *//; s/|/ /g' | tail -n 2 | paste -sd ';')
  say "| $name | $verdict | $((SECONDS - start)) | ${summary:--} |"
  printf '    %s, %s s %s\n' "$verdict" "$((SECONDS - start))" "$summary"
}

sanitizer() { # TOOL SECONDS ARGUMENTS OF sanitize.py...
  local tool=$1 limit=$2
  shift 2
  if [ "$device" = cpu ]; then
    stage "$tool" "$limit" "$python" "$work/bench/sanitize.py" --device cpu "$@"
  elif command -v compute-sanitizer > /dev/null; then
    # torch's pool of memory would hide a step beyond a tensor's end.
    stage "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=moeprune "$python" "$work/bench/sanitize.py" "$@"
  else
    say "| $tool | not run | - | no compute-sanitizer here |"
  fi
}

: > "$report"
say "# $gpu"
say ""
say "$(date +%F), $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | sed 's/^/driver /;q'), \
nvcc $(nvcc --version 2> /dev/null | sed -n 's/.*, V//p'), $("$python" -c '
import platform, torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda} of torch")'); \
\`bench/gpu_check.sh\`"
say ""
say "| stage | result | seconds | summary |"
say "| --- | --- | --- | --- |"

# Away from the checkout, whose moeprune_ext/ would hide the one built here.
cp -r "$checkout/python_tests" "$checkout/bench" "$work"
cd "$work" || exit 1

stage build 100 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --disable-pip-version-check \
  --target "$work/site" "$checkout" -C cmake.define.MOEPRUNE_CUDA=ON -C "build-dir=$work/build"
stage import 20 "$python" -c '
import sys, moeprune_ext as mp
info = mp.build_info()
print("compute capabilities", *info["cuda_archs"], "CUDA", info["cuda_runtime"], "usable:", info["cuda_available"])
sys.exit(not mp.__file__.startswith(sys.argv[1]))' "$work/site" # what was just built is what is checked
stage tests 75 "$python" -m pytest -q -p no:cacheprovider --rootdir "$work" -k "$tests" \
  python_tests/ops/test_overlap.py python_tests/ops/test_masked_router.py python_tests/ops/test_router_map.py \
  python_tests/ops/test_routing_moments.py python_tests/checkpoint/test_streaming.py
sanitizer memcheck 40
sanitizer racecheck 35 --quick
sanitizer synccheck 20 --quick

# The benches' own tables go into the report: all cases first, torch.compile where time is left.
quick=()
[ "$device" = cpu ] && quick=(--quick)
stage bench 55 "$python" bench/run.py --device "$device" --no-compile "${quick[@]}"
stage bench-compile 25 "$python" bench/run.py --device "$device" --only 'nested.*Qwen3|Qwen3.*(C=1,|S=)' "${quick[@]}"
# A search of a random Qwen3-30B-A3B of full size: 61 GB of weights.
stage search 170 "$python" bench/search.py --device "$device" --model qwen3-30b "${quick[@]}"

for table in bench bench-compile; do
  { printf '\n## %s\n\n' "$table"; grep -E '^\||^20[0-9]{2}-' "$work/$table.log" | sed 's/^| operation/\n&/'; } >> "$report"
done
{ printf '\n## search\n\n'; sed -n '/^20[0-9]\{2\}-/,$p' "$work/search.log" | sed 's/^## /### /'; } >> "$report"
module=$(find "$work/site/moeprune_ext" -name '_C*.so' 2> /dev/null | head -n 1)
if [ -n "$module" ] && command -v cuobjdump > /dev/null; then
  { printf '\n## Resources\n\n```\n'; cuobjdump --dump-resource-usage "$module" 2> /dev/null | c++filt |
    grep -E 'arch =|Function|REG' | cut -c 1-200; printf '```\n'; } >> "$report"
fi
[ -f "$work/failures" ] && { printf '\n## Failures\n'; cat "$work/failures"; } >> "$report"

printf 'report: %s (%s s in all)\n' "$report" "$SECONDS"
exit "$failed"
