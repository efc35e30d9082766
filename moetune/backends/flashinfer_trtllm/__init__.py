"""FlashInfer's trtllm-gen MoE kernels for compute capability 10.0 and 10.3: given ids, or logits that they route.

Written against the signatures and the C++ sources of FlashInfer 0.7.2.post1 and tested on CPUs through FlashInfer's own
Python code down to the compiled module's functions. It has not run on the chip.
"""
