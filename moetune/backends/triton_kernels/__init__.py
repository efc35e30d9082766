"""OpenAI's triton_kernels, with which vLLM runs gpt-oss's mxfp4 experts on Hopper."""
