"""Requests in, tokens out: which pipeline computes a request, step by step, and whether that pipeline is healthy."""
