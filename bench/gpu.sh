#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one call of less than 9 minutes: parity, tuning, benchmarks, pictures.
#
#     bench/gpu.sh                  results in bench/results/local
#     OUT=DIR bench/gpu.sh          results in DIR
#     DRY_RUN=1 bench/gpu.sh        all of it, tiny, on the CPU under Triton's interpreter: do the scripts work?
#
# Runs from a checkout, nothing need be installed but what the scripts import. A step whose result lies in OUT is
# skipped; results of a step that failed are named partial-*. Tuning rewrites the GPU's row in
# fastmmoe_kernels/experts/tiles.py, which the benchmarks then use: `git diff` shows it. Exit status 1 if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/local}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
LIMIT=${LIMIT:-530}  # seconds for all steps
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

passed=()
failed=()

# step NAME RESULT SECONDS COMMAND...: RESULT is a file in OUT, which COMMAND writes as $PARTIAL
step() {
    local name=$1 result=$2 seconds=$3
    shift 3
    if [ -s "$OUT/$result" ]; then
        echo "== $name: skipped, $OUT/$result is there"
        return
    fi
    local left=$((LIMIT - SECONDS))
    [ "$seconds" -lt "$left" ] || seconds=$left
    echo "== $name (after $SECONDS s, at most $seconds s)"
    if [ "$seconds" -le 0 ]; then
        failed+=("$name: no time left")
        return
    fi
    PARTIAL="$OUT/partial-$result"
    rm -f "$PARTIAL"
    timeout --kill-after=10 "$seconds" "${@//\$PARTIAL/$PARTIAL}" 2>&1 | tee -a "$OUT/log.txt"
    local status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then
        # pytest leaves no file of its own
        [ -e "$PARTIAL" ] || echo "passed" >"$PARTIAL"
        mv "$PARTIAL" "$OUT/$result"
        passed+=("$name")
    else
        echo "== $name failed with status $status"
        failed+=("$name: status $status")
    fi
}

if [ -n "$DRY_RUN" ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    device=cpu
    tests=(tests/kernels/test_experts.py)
    tuning=(--shape tiny --rows 16 --passes 1 --candidates 1 --rounds 1 --workers 1)
    experts=(--backend triton --shape 32:32:4 --tokens 16 --top-k 2 --top-k 1 --routing skewed --rounds 1 --threads 1)
    prefill=(--size tiny --tiles 1 --text 8 --rounds 1 --steps 1)
else
    # without one the tests would be skipped, and that would look like a success
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "torch sees no GPU"; exit 2; }
    device=cuda
    tests=()
    tuning=(--write)
    experts=()
    prefill=(--size 30b --tiles 7 --text 100)
fi
mkdir -p "$OUT"
# tests spend most of their time compiling: several processes share it, where pytest-xdist is installed
if [ -z "$DRY_RUN" ] && "$PYTHON" -c "import xdist" 2>/dev/null; then
    tests+=(--numprocesses 8)
    export OMP_NUM_THREADS=2
fi

step parity parity.txt 170 "$PYTHON" -m pytest -q -m gpu "${tests[@]}"
step tuning tiles.json 180 "$PYTHON" bench/tune_experts.py --device "$device" "${tuning[@]}" --json '$PARTIAL'
step experts experts.json 170 "$PYTHON" bench/bench_experts.py --device "$device" "${experts[@]}" --json '$PARTIAL'
step prefill prefill.json 120 "$PYTHON" bench/bench_prefill.py --device "$device" "${prefill[@]}" --json '$PARTIAL'
if [ -s "$OUT/experts.json" ]; then
    step plots experts.png 30 "$PYTHON" bench/plot_experts.py "$OUT/experts.json" '$PARTIAL'
fi

echo "== done after $SECONDS s, in $OUT: ${passed[*]:-nothing new}"
for line in ${failed[@]+"${failed[@]}"}; do
    echo "== FAILED $line"
done
[ ${#failed[@]} -eq 0 ]
