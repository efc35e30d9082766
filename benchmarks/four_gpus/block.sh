#!/usr/bin/env bash
# The real block: two deployments at once on two GPUs each, then all dispatchers on four GPUs, and three formats of the
# all-gather. FlashInfer is needed. traffic.sh tunes the profiles; what is missing is tuned here.
#
#   OUT=… [KEPT=…] benchmarks/four_gpus/block.sh
source "$(dirname "$0")/common.sh"

# Named before the run: 5 % ahead of the engine's own choice at 256 and 512 tokens.
measured=(--tokens 16,128,256,512,1024)

two_ranks() {
  deployments 2 | grep -e "$1" | while read -r options; do block 2 $options "${measured[@]}" </dev/null; done
}
two_ranks_triton() { two_ranks triton; }
two_ranks_cutlass() { two_ranks flashinfer-cutlass; }

four_ranks() {
  deployments 4 | head -n 4 | while read -r options; do block 4 $options "${measured[@]}" </dev/null; done
  for wire in "bf16 --wire-routing logits" "fp4 --wire-routing logits" "fp4 --wire-routing packed_topk"; do
    block 4 --model deepseek-r1 --precision bf16 --ep 4 --dispatch allgather --ladder 64,1024 --backend triton \
      --routing random --tokens 8,32,128,512,1024,2048,4096 --wire $wire
  done
  deployments 4 | tail -n +5 | while read -r options; do block 4 $options "${measured[@]}" </dev/null; done
}

lane 0,1 two_ranks_triton
lane 2,3 two_ranks_cutlass
wait
lane 0,1,2,3 four_ranks
wait
