"""Loads a stage, and computes its micro-batches on one thread."""
