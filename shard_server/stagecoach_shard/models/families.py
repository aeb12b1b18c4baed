"""The families of models that a shard computes: each `model_type` of config.json with the file that reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models import llama, mistral, qwen2, qwen3

FAMILIES: dict[str, Callable[[RawConfig], ModelConfig]] = {
    "llama": llama.read_config,
    "mistral": mistral.read_config,
    "qwen2": qwen2.read_config,
    "qwen3": qwen3.read_config,
}


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the folder `path`. Raises CheckpointError as `Checkpoint.open` and `read_config` do."""
    return Checkpoint.open(path, read_config)


def read_config(raw: RawConfig) -> ModelConfig:
    """What config.json says of the model.

    Raises CheckpointError with the field's name for anything missing, wrong or not supported: what would be computed
    wrongly is refused.
    """
    family = raw.text("model_type")
    if family not in FAMILIES:
        raw.refuse("model_type", f"must be one of {', '.join(FAMILIES)}", limit=", ".join(FAMILIES))
    return FAMILIES[family](raw)
