"""The backend of Humming's MoE kernels, which are compiled at run time, for weights of 4 bits on Hopper."""
