#!/usr/bin/env bash
# From a launch line to the folder that the engine reads, on the GPU of this machine: prints what each command prints.
#
#   benchmarks/launch_to_folder.sh OUT [SECONDS]
#
# OUT takes the store and the exported files; each tune gets SECONDS (60 by default).
set -uo pipefail
out=$1 seconds=${2:-60}
mkdir -p "$out"
say() {
  echo "\$ $*"
  "$@"
  echo "exit $?"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
say python3 -m moetune tune --store "$out/store" --time-budget "$seconds" --export "$out/tuned" \
  --launch "vllm serve Qwen/Qwen3-30B-A3B -dp 8 --enable-expert-parallel --moe-backend triton > log 2>&1 &"
say python3 -m moetune tune --store "$out/store" --time-budget "$seconds" --export "$out/tuned" \
  --launch "python -m sglang.launch_server --model-path Qwen/Qwen3-30B-A3B --tp 8 --ep 8 --attn-dp-size 8 --moe-runner-backend triton"
say python3 -m moetune tune --store "$out/store" --time-budget "$seconds" --model deepseek-r1 --ep 16 --redundant-experts 32 \
  --dispatch allgather --backend triton --ladder 64,512
find "$out/tuned" -type f | sort
