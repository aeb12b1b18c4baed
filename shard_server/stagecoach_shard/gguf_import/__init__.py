"""Turns a GGUF file into a checkpoint folder that the shards, and other tools, can load."""

from stagecoach_shard.gguf_import.importer import import_gguf

__all__ = ["import_gguf"]
