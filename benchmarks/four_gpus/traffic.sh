#!/usr/bin/env bash
# GPU tests, `--start`, `check` and `compare`; gain against skew; and the profiles for block.sh, by `moetune batch` on two
# GPUs. FlashInfer is needed.
#
#   OUT=… [KEPT=…] benchmarks/four_gpus/traffic.sh
source "$(dirname "$0")/common.sh"

tests_and_checks() {
  local profile
  profile=$(ls profiles/NVIDIA_H200/e128-k8-h4096-*/ep8-tp1-dp-allgather-*/triton-*.json)
  local deployment="--model qwen3-235b-a22b --ep 8 --dispatch allgather --ladder vllm --backend triton"
  job start 60 python3 -m moetune tune $deployment --start "$profile" --again --store "$OUT/started" --json
  job gpu-tests 330 python3 -m pytest -m gpu -q -p no:cacheprovider tests --deselect tests/engine/test_nccl_ranks.py \
    --ignore tests/backends/marlin --ignore tests/backends/triton_kernels --ignore tests/backends/vllm_experts \
    --ignore tests/backends/flashinfer_cutlass --ignore tests/cli/test_dep_bench_gpu.py --durations 10
  python3 benchmarks/four_gpus/spoiled.py "$profile" "$OUT/spoiled.json"
  job check-spoiled 40 python3 -m moetune check "$OUT/spoiled.json" --rows 64,512 --json
  for run in 1 2 3 4 5 6 7 8 9 10; do
    job "check-$run" 40 python3 -m moetune check "$profile" --rows 64,512 --json
  done
  job compare-equal 30 python3 -m moetune compare "$profile" "$profile" --json
  job compare-spoiled 60 python3 -m moetune compare "$profile" "$OUT/spoiled.json" --measure --json
}

skew() {
  job cutlass-tests 240 python3 -m pytest -m gpu -q -p no:cacheprovider tests/backends/flashinfer_cutlass
  job gain-skew 600 python3 benchmarks/gain_skew.py measure "$OUT/gain_skew.jsonl" --seconds "$(left 20)"
}

two_ranks() {
  job nccl-ranks 120 python3 -m pytest -m gpu -q -p no:cacheprovider tests/engine/test_nccl_ranks.py
  job dep-bench-tests 180 python3 -m pytest -m gpu -q -p no:cacheprovider tests/cli/test_dep_bench_gpu.py
  job batch 600 python3 -m moetune batch benchmarks/four_gpus/block_jobs.txt --json
}

lane 0 tests_and_checks
lane 1 skew
lane 2,3 two_ranks
wait
