"""The muscle of a cluster: holds a contiguous range of a model's layers and computes what a router sends."""
