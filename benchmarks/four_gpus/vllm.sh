#!/usr/bin/env bash
# What needs stock vLLM 0.26: Marlin, triton_kernels, the batched Triton kernel, vLLM's other kernels for fp8, and
# whole engines.
#
#   OUT=… [KEPT=…] benchmarks/four_gpus/vllm.sh FOLDER_OF_VLLM
source "$(dirname "$0")/common.sh"
vllm=$1

# The driver compiles vLLM's Marlin for Hopper when a process loads it first, about a minute for each format of weights.
marlin() {
  job marlin-tests 300 python3 -m pytest -m gpu -q -p no:cacheprovider tests/backends/marlin
  job marlin-blocks 600 python3 benchmarks/marlin_blocks.py measure "$OUT/marlin.jsonl" --seconds "$(($(left 30) / 2))"
}
gpt_oss() {
  job kernels-tests 200 python3 -m pytest -m gpu -q -p no:cacheprovider tests/backends/triton_kernels
  job kernels-flags 600 python3 benchmarks/triton_kernels_flags.py measure "$OUT/kernels.jsonl" --seconds "$(left 30)"
}
four_bits() {
  marlin
  gpt_oss
}
batched() {
  job batched-tests 150 python3 -m pytest -m gpu -q -p no:cacheprovider tests/backends/batched_triton
  job batched-file 600 python3 benchmarks/batched_file.py measure "$OUT/batched.jsonl" --store "$OUT/batched-store" \
    --vllm "$vllm" --seconds "$(($(left 30) / 2))"
}
rivals() {
  job rivals-tests 120 python3 -m pytest -m gpu -q -p no:cacheprovider tests/backends/flashinfer_fp8_block \
    tests/backends/vllm_experts
  job rivals 600 python3 benchmarks/rivals.py measure "$OUT/rivals.jsonl" --seconds "$(left 30)"
}
fp8_and_batched() {
  batched
  rivals
}
# `run.py` sets CUDA_VISIBLE_DEVICES itself, so these GPUs are numbered as those of the host.
flashinfer_arms() {
  job engine-flashinfer 600 python3 benchmarks/engine/run.py measure "$OUT/engine-flashinfer" --cases qwen3-30b \
    --arms flashinfer,plugin-flashinfer --reps 3 --gpus 2 --seconds "$(left 160)"
}
shares() {
  job engine-shares 600 python3 benchmarks/engine/run.py measure "$OUT/engine-shares" --cases qwen3-235b-share \
    --arms default,moetune --reps 2 --gpus 3 --seconds "$(left 200)"
}

lane 0 four_bits
lane 1 fp8_and_batched
lane 2 flashinfer_arms
lane 3 shares
wait
