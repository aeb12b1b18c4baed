"""Layers in our own C kernels, for bfloat16 on CPUs."""
