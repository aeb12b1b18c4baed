"""A checkpoint folder: its configuration, its tensors, and its fingerprint."""
