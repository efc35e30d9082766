#!/usr/bin/env bash
# One rank of EP 8 and EP 32 on each of four GPUs, then FlashInfer's kernels for gpt-oss against its own autotune.
# FlashInfer is needed.
#
#   OUT=… [KEPT=…] benchmarks/four_gpus/one_rank.sh
source "$(dirname "$0")/common.sh"

rank_of() {
  job "one-rank-$1-ep$2" 280 python3 -m moetune dep-bench --model $1 --precision bf16 --ep $2 --ladder hybrid \
    --dispatch vllm:deepep_high_throughput --backend flashinfer-cutlass --seconds 200 \
    --journal "$OUT/one-rank-$1-ep$2.jsonl" --store "$OUT/store-$1-ep$2" --json
}
gpt_oss_of() {
  job "autotune-gpt-oss-ep$1" 600 python3 benchmarks/flashinfer_autotune.py "$OUT/autotune-gpt-oss-ep$1.jsonl" \
    --model gpt-oss-120b --precision mxfp4 --ep $1 --dispatch $2 --seconds "$(left 30)"
}
qwen_of_8() {
  rank_of qwen3-235b-a22b 8
  gpt_oss_of 8 deduplicated
}
qwen_of_32() {
  rank_of qwen3-235b-a22b 32
  gpt_oss_of 4 allgather
}
deepseek_of_8() { rank_of deepseek-r1 8; }
deepseek_of_32() { rank_of deepseek-r1 32; }

lane 0 qwen_of_8
lane 1 qwen_of_32
lane 2 deepseek_of_8
lane 3 deepseek_of_32
wait
