#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one call of less than 9 minutes: parity, tuning, benchmarks.
#
#     bench/gpu.sh                     results in bench/results/local
#     bench/gpu.sh parity tuning       only these of the steps stress, parity, sanitizer, tuning, experts, ops, prefill,
#                                      break-even, overhead, counters, largest; they have all of the time, and so several calls
#                                      measure more than one does: "stress parity", "tuning experts", "ops prefill",
#                                      "break-even overhead counters largest"
#     OUT=DIR LIMIT=520 bench/gpu.sh   results in DIR, after 520 seconds at most
#     DRY_RUN=1 bench/gpu.sh           all of it, tiny, on the CPU under Triton's interpreter: do the scripts work?
#
# Runs from a checkout, nothing need be installed but what the scripts import. A step whose result lies in OUT is
# skipped; results of a step that failed are named partial-*, and no step stops another. Tuning rewrites the GPU's rows
# in fastmmoe_kernels/experts/tiles.py, which the benchmarks then use: `git diff` shows it, as do "row" and "most_pairs" in
# tiles.json.
# Exit status 1 if a step failed. The pictures are drawn afterwards, anywhere:
#
#     python bench/plot_experts.py DIR/experts.json experts.png
#     python bench/plot_ops.py DIR/ops.json ops.png
#     python bench/plot_prefill.py DIR/prefill.json DIR/break_even.json prefill.png
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/local}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
LIMIT=${LIMIT:-520}  # seconds for all steps
[[ $LIMIT =~ ^[0-9]+$ ]] || { echo "LIMIT: expected seconds, got $LIMIT"; exit 2; }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# in a log every update of a progress bar is a line
export TQDM_MININTERVAL=10
METRICS=l1tex__m_xbar2l1tex_read_bytes.sum.per_second,dram__bytes_read.sum.per_second
METRICS+=,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
METRICS+=,l1tex__data_bank_conflicts_pipe_lsu.sum,smsp__average_warp_latency_issue_stalled_long_scoreboard.pct
METRICS+=,smsp__average_warp_latency_issue_stalled_barrier.pct

# how the steps share the time
declare -A share=([stress]=60 [parity]=150 [sanitizer]=60 [tuning]=120 [experts]=80 [ops]=60 [prefill]=75 [break-even]=50
    [overhead]=45 [counters]=40 [largest]=60)
chosen=("$@")
# the sanitizer takes a call of its own: bench/gpu.sh sanitizer
[ $# -gt 0 ] || chosen=(stress parity tuning experts ops prefill break-even overhead counters largest)
shares=0  # of the steps to come
for name in "${chosen[@]}"; do
    [ -n "${share[$name]:-}" ] || { echo "expected steps out of ${!share[*]}, got $name"; exit 2; }
    shares=$((shares + ${share[$name]}))
done

passed=()
failed=()

# step NAME RESULT COMMAND...: RESULT is a file in OUT, which COMMAND writes as $PARTIAL. After $BUDGET seconds
# COMMAND should come to its end: what it began then still has time
step() {
    local name=$1 result=$2
    shift 2
    [[ " ${chosen[*]} " == *" $name "* ]] || return
    # time that one step leaves, the later ones have
    local seconds=$(((LIMIT - SECONDS) * ${share[$name]} / shares))
    shares=$((shares - ${share[$name]}))
    if [ -s "$OUT/$result" ]; then
        echo "== $name: skipped, $OUT/$result is there"
        return
    fi
    echo "== $name (after $SECONDS s, at most $seconds s)" | tee -a "$OUT/log.txt"
    if [ "$seconds" -le 0 ]; then
        failed+=("$name: no time left")
        return
    fi
    local command=("${@//\$BUDGET/$((seconds > 35 ? seconds - 30 : 5))}")
    PARTIAL="$OUT/partial-$result"
    rm -f "$PARTIAL"
    # interrupted, pytest still says what failed; a shell's background jobs would ignore that. All output is in the log
    timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "${command[@]//\$PARTIAL/$PARTIAL}" 2>&1 |
        tee -a "$OUT/log.txt" | tail -n 30
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
    stress=(--shape cpu-small --tokens 4 --times 2)
    largest=(--size tiny --tile-tokens 16 --text 8 --rounds 1 --steps 1 --tiles 5 --batch 2)
    ops=(--backend triton --shape tiny --tokens 16 --rounds 1 --threads 1)
    prefill=(--size tiny --tile-tokens 16 --text 8 --rounds 1 --steps 1 --tiles 4 --batch 1)
    break_even=(--size tiny --tile-tokens 16 --text 8 --rounds 1 --steps 1 --tiles 1 --tiles 2 --batch 1 --mixed 2)
    overhead=(--size tiny --rounds 1 --steps 1)
    sanitizer=(--without --cases 1)
else
    # without one the tests would be skipped, and that would look like a success
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "torch sees no GPU"; exit 2; }
    device=cuda
    # collecting the others takes time too
    mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    # half of the step's time: a pass that has begun, and what is timed after it, take the rest
    tuning=(--write --budget 60 --rounds 10)
    experts=(--rounds 10)
    ops=(--rounds 10)
    stress=(--times 200)
    counters=(--shape A --tokens 8192 --tokens 1892 --routing uniform --rounds 1)
    prefill=(--size 30b --text 100 --rounds 3 --steps 2 --tiles 7 --tiles 14 --tiles 31 --batch 1)
    # the most memory, and so the last: about 73 GB
    largest=(--size 30b --text 100 --rounds 3 --steps 2 --tiles 7 --tiles 25 --batch 8)
    break_even=(--size 30b --text 100 --rounds 3 --steps 2 --tiles 1 --tiles 2 --tiles 4 --batch 1 --batch 8 --mixed 8)
    overhead=(--size 30b --rounds 10 --steps 3)
    sanitizer=(--cases 2)
fi
mkdir -p "$OUT" || exit 2
# tests spend most of their time compiling: several processes share it, where pytest-xdist is installed
if [ -z "$DRY_RUN" ] && "$PYTHON" -c "import xdist" 2>/dev/null; then
    tests+=(--numprocesses 8)
    export OMP_NUM_THREADS=2
fi

step stress stress.json "$PYTHON" bench/stress_experts.py --device "$device" "${stress[@]}" --json '$PARTIAL'
step parity parity.txt "$PYTHON" -m pytest -v -m gpu "${tests[@]}"
# accesses out of bounds, races, reads of what nobody wrote, barriers: slow, so few cases of each op
if command -v compute-sanitizer >/dev/null || [ -n "$DRY_RUN" ]; then
    step sanitizer sanitizer.json "$PYTHON" bench/sanitize.py "${sanitizer[@]}" --budget '$BUDGET' --json '$PARTIAL'
elif [[ " ${chosen[*]} " == *" sanitizer "* ]]; then
    shares=$((shares - ${share[sanitizer]}))
    echo "== sanitizer: skipped, compute-sanitizer is not there"
fi
step tuning tiles.json "$PYTHON" bench/tune_experts.py --device "$device" "${tuning[@]}" --json '$PARTIAL'
step experts experts.json "$PYTHON" bench/bench_experts.py --device "$device" "${experts[@]}" --json '$PARTIAL'
step ops ops.json "$PYTHON" bench/bench_ops.py --device "$device" "${ops[@]}" --budget '$BUDGET' --json '$PARTIAL'
step prefill prefill.json \
    "$PYTHON" bench/bench_prefill.py --device "$device" "${prefill[@]}" --budget '$BUDGET' --json '$PARTIAL'
step break-even break_even.json \
    "$PYTHON" bench/bench_prefill.py --device "$device" "${break_even[@]}" --budget '$BUDGET' --json '$PARTIAL'
step overhead overhead.json "$PYTHON" bench/bench_overhead.py --device "$device" "${overhead[@]}" --json '$PARTIAL'
# what bounds the two GEMMs: L2 to multiprocessors, memory, tensor cores, and what warps wait for
if command -v ncu >/dev/null && [ -z "$DRY_RUN" ]; then
    step counters counters.csv ncu --clock-control none --csv --log-file '$PARTIAL' --kernel-name 'regex:gate_up|down' \
        --launch-count 8 --metrics "$METRICS" "$PYTHON" bench/bench_experts.py --device "$device" "${counters[@]}"
elif [[ " ${chosen[*]} " == *" counters "* ]]; then
    shares=$((shares - ${share[counters]}))
    echo "== counters: skipped, ncu is not there"
fi
step largest largest.json \
    "$PYTHON" bench/bench_prefill.py --device "$device" "${largest[@]}" --budget '$BUDGET' --json '$PARTIAL'

echo "== done after $SECONDS s, in $OUT: ${passed[*]:-nothing new}"
for line in ${failed[@]+"${failed[@]}"}; do
    echo "== FAILED $line"
done
[ ${#failed[@]} -eq 0 ]
