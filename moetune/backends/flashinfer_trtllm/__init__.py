"""The backends of FlashInfer's trtllm-gen MoE kernels, for compute capability 10.0 and 10.3.

They follow the signatures and the C++ sources of FlashInfer 0.7.2.post1. Tests on CPUs run FlashInfer's own Python code
down to the functions of the compiled module. Nothing here has run on such a GPU.
"""
