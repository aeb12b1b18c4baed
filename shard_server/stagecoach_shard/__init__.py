"""A shard server: holds a contiguous range of a model's layers, and computes the micro-batches that routers send."""
