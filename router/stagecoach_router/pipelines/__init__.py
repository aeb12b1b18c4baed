"""Pipelines made of shards: who is there, which of them make a chain, how it is opened, when it counts as lost."""
