"""Turns a GGUF file into a checkpoint folder that the shards, and other tools, can load."""

from stagecoach_gguf.importer import import_gguf

__all__ = ["import_gguf"]
