#!/usr/bin/env bash
# The real block on four GPUs, with all dispatchers, and the formats of the all-gather. FlashInfer is needed.
#
#   OUT=… [KEPT=…] benchmarks/four_gpus/block.sh
source "$(dirname "$0")/common.sh"

block() {
  local model=$1 backend=$2 name=$3
  shift 3
  job "ep4-$model-$backend-$name" 150 $(ranks 4) --model $model --precision bf16 --ep 4 --backend $backend \
    --ladder hybrid --tune-max-num-tokens 8192 --tokens 16,64,256,512,1024,2048 --seconds 90 \
    --journal "$OUT/dep.jsonl" --json "$@"
}

four_ranks() {
  for wire in "bf16 --wire-routing logits" "fp4 --wire-routing logits" "fp4 --wire-routing packed_topk"; do
    job "ep4-wire-${wire// --wire-routing /-}" 100 $(ranks 4) --model deepseek-r1 --precision bf16 --ep 4 \
      --dispatch allgather --ladder 64,1024 --backend triton --routing random --tokens 8,32,128,512,1024,2048,4096 \
      --wire $wire --seconds 60 --journal "$OUT/dep.jsonl" --json
  done
  for backend in flashinfer-cutlass triton; do
    block qwen3-235b-a22b $backend allgather --dispatch allgather
    block qwen3-235b-a22b $backend deduplicated --dispatch alltoall --layout deduplicated
    block qwen3-235b-a22b $backend slot --dispatch alltoall --layout slot
    block qwen3-235b-a22b $backend pool --dispatch alltoall --layout pool
  done
  block deepseek-r1 flashinfer-cutlass allgather --dispatch allgather
  block deepseek-r1 flashinfer-cutlass deduplicated --dispatch alltoall --layout deduplicated
}

lane 0,1,2,3 four_ranks
wait
