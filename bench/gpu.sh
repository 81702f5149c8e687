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
reserved=15          # of which for the pictures
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

passed=()
failed=()

# step NAME RESULT SECONDS COMMAND...: RESULT is a file in OUT, which COMMAND writes as $PARTIAL. After $BUDGET seconds
# COMMAND should come to its end: what it began then still has time
step() {
    local name=$1 result=$2 seconds=$3
    shift 3
    if [ -s "$OUT/$result" ]; then
        echo "== $name: skipped, $OUT/$result is there"
        return
    fi
    local left=$((LIMIT - SECONDS - reserved))
    [ "$seconds" -lt "$left" ] || seconds=$left
    echo "== $name (after $SECONDS s, at most $seconds s)"
    if [ "$seconds" -le 0 ]; then
        failed+=("$name: no time left")
        return
    fi
    local command=("${@//\$BUDGET/$((seconds > 35 ? seconds - 30 : 5))}")
    PARTIAL="$OUT/partial-$result"
    rm -f "$PARTIAL"
    timeout --kill-after=10 "$seconds" "${command[@]//\$PARTIAL/$PARTIAL}" 2>&1 | tee -a "$OUT/log.txt"
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
    prefill=(--size tiny --tile-tokens 16 --text 8 --rounds 1 --steps 1 --tiles 4 --batch 1)
    break_even=(--size tiny --tile-tokens 16 --text 8 --rounds 1 --steps 1 --tiles 1 --tiles 2 --batch 1 --mixed 2)
    overhead=(--size tiny --rounds 1 --steps 1)
    experts=(--backend triton --shape 32:32:4 --tokens 16 --top-k 2 --top-k 1 --routing skewed --rounds 1 --threads 1)
else
    # without one the tests would be skipped, and that would look like a success
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "torch sees no GPU"; exit 2; }
    device=cuda
    tests=()
    tuning=(--write --budget 40 --rounds 10)
    prefill=(--size 30b --text 100 --rounds 3 --steps 2 --tiles 7 --tiles 25 --tiles 13 --batch 1 --batch 8)
    break_even=(--size 30b --text 100 --rounds 3 --steps 2 --tiles 1 --tiles 2 --tiles 4 --batch 1 --batch 8 --mixed 8)
    overhead=(--size 30b --rounds 10 --steps 3)
    experts=(--rounds 10)
fi
mkdir -p "$OUT"
# tests spend most of their time compiling: several processes share it, where pytest-xdist is installed
if [ -z "$DRY_RUN" ] && "$PYTHON" -c "import xdist" 2>/dev/null; then
    tests+=(--numprocesses 8)
    export OMP_NUM_THREADS=2
fi

# an early step that takes longer than usual is at the expense of the last
step parity parity.txt 110 "$PYTHON" -m pytest -q -m gpu "${tests[@]}"
step tuning tiles.json 90 "$PYTHON" bench/tune_experts.py --device "$device" "${tuning[@]}" --json '$PARTIAL'
step prefill prefill.json 160 \
    "$PYTHON" bench/bench_prefill.py --device "$device" "${prefill[@]}" --budget '$BUDGET' --json '$PARTIAL'
step break-even break_even.json 110 \
    "$PYTHON" bench/bench_prefill.py --device "$device" "${break_even[@]}" --budget '$BUDGET' --json '$PARTIAL'
step overhead overhead.json 60 "$PYTHON" bench/bench_overhead.py --device "$device" "${overhead[@]}" --json '$PARTIAL'
step experts experts.json 120 "$PYTHON" bench/bench_experts.py --device "$device" "${experts[@]}" --json '$PARTIAL'

reserved=0
if [ -s "$OUT/experts.json" ]; then
    step "experts' picture" experts.png 10 "$PYTHON" bench/plot_experts.py "$OUT/experts.json" '$PARTIAL'
fi
figures=()
for name in prefill break_even; do
    [ -s "$OUT/$name.json" ] && figures+=("$OUT/$name.json")
done
# once both are there: a picture that is there is not drawn again
if [ ${#figures[@]} -eq 2 ]; then
    step "prefill's picture" prefill.png 10 "$PYTHON" bench/plot_prefill.py "${figures[@]}" '$PARTIAL'
fi

echo "== done after $SECONDS s, in $OUT: ${passed[*]:-nothing new}"
for line in ${failed[@]+"${failed[@]}"}; do
    echo "== FAILED $line"
done
[ ${#failed[@]} -eq 0 ]
