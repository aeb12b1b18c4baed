"""Turns a GGUF file into a checkpoint folder, which shards and other tools can load. No shard needs this package."""

from stagecoach_gguf.importer import import_gguf

__all__ = ["import_gguf"]
