# Sourced by the scripts of this folder. Jobs run in lanes: a lane has GPUs of its own, and its jobs run one after the
# other. Lanes run at the same time. A job that fails or is cut does not stop its lane.
#
#   OUT      the folder of all results: journals, stores, documents, logs
#   KEPT     a folder of an earlier call's results, copied to OUT first, so that its journals go on
#   SECONDS_IN_ALL  no job begins after this many seconds, and the one that runs is ended  [540]
set -uo pipefail
: "${OUT:?OUT must name the folder of the results}"
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MOETUNE_STORE=${MOETUNE_STORE:-$OUT/store}
end=$((SECONDS + ${SECONDS_IN_ALL:-540}))
mkdir -p "$OUT/logs"
if [ -n "${KEPT:-}" ]; then cp -r "$KEPT/." "$OUT/"; fi

# left: the seconds that are left, less those given.
left() { echo $((end - SECONDS - ${1:-0})); }

# job NAME LIMIT COMMAND…: runs it for at most LIMIT seconds, unless an earlier call has done it. stdout goes to
# logs/NAME.out, stderr to logs/NAME.err.
job() {
  local name=$1 limit=$2 code=0 began=$SECONDS
  shift 2
  if [ -e "$OUT/logs/$name.done" ]; then return; fi
  [ "$limit" -lt "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "$name not begun" | tee -a "$OUT/jobs.txt"
    return
  fi
  timeout --signal INT --kill-after 10 "$limit" "$@" >"$OUT/logs/$name.out" 2>"$OUT/logs/$name.err" || code=$?
  echo "$name exit $code after $((SECONDS - began)) s" | tee -a "$OUT/jobs.txt"
  if [ "$code" = 0 ]; then touch "$OUT/logs/$name.done"; else tail -n 6 "$OUT/logs/$name.err" | cut -c 1-300; fi
}

# lane GPUS FUNCTION: runs the function in the background with these GPUs alone.
lane() { CUDA_VISIBLE_DEVICES=$1 "$2" & }

# deployments EP: those of block_jobs.txt with this number of ranks.
deployments() { grep -e "--ep $1 --dispatch" benchmarks/four_gpus/block_jobs.txt | grep -v -e "--ladder 64"; }

# block EP OPTIONS…: measures the real block on EP GPUs.
block() {
  local ep=$1 name
  shift
  name=block$(tr -cs 'a-z0-9_' - <<<"$* " | sed 's/-$//')
  job "$name" 160 torchrun --standalone --nproc-per-node "$ep" -m moetune dep-bench "$@" --seconds 120 \
    --journal "$OUT/$name.jsonl" --json
  # without time for every batch size the next call goes on
  grep -q '"left_out": *\[\]' "$OUT/logs/$name.out" 2>/dev/null || rm -f "$OUT/logs/$name.done"
}
