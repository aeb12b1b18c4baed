"""A layer in our own C kernels: bfloat16 on CPUs."""
