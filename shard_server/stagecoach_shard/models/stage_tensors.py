"""Which tensors of a checkpoint a stage reads: those of its layers, and the tables at the two ends of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stagecoach.errors import CheckpointError, TopologyError
from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.models.layer_weights import LayerWeights

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class StageTensors:
    """The names of a stage's tensors."""

    names: frozenset[str]  # all of them
    embedding: str  # read by the first stage
    head: str  # read by the last stage; the embedding's name where the checkpoint has one table for both

    @classmethod
    def of(cls, checkpoint: Checkpoint, layers: LayerRange) -> StageTensors:
        """Those of `layers`.

        Raises TopologyError for layers that the model does not have, CheckpointError for a tensor in one of them that
        would not be used: then the model is not what its config.json says.
        """
        config = checkpoint.config
        if layers.end > config.num_layers:
            raise TopologyError(
                f"layers {layers} were asked for; {checkpoint.name} has {config.num_layers}",
                field="layers",
                limit=f"0:{config.num_layers}",
                value=str(layers),
            )
        embedding, head = _table_names(checkpoint)
        names = {name for index in range(layers.start, layers.end) for name in LayerWeights.tensor_names(config, index)}
        if layers.start == 0:
            names.add(embedding)
        if layers.end == config.num_layers:
            names |= {FINAL_NORM, head}
        _refuse_strangers(checkpoint, layers, names)
        return cls(frozenset(names), embedding, head)

    def num_bytes(self, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
        """What they take in `dtype`: the least that the stage takes, as some are packed besides."""
        entries = [checkpoint.tensors[name] for name in self.names if name in checkpoint.tensors]
        return dtype.itemsize * sum(math.prod(entry.shape) for entry in entries)


def _table_names(checkpoint: Checkpoint) -> tuple[str, str]:
    """The tensors that hold embedding and head.

    With tied weights either may be absent; where both are there each is used, which is what transformers does.
    """
    if not checkpoint.config.tie_word_embeddings:
        return EMBEDDING, HEAD
    embedding = HEAD if EMBEDDING not in checkpoint.tensors and HEAD in checkpoint.tensors else EMBEDDING
    return embedding, HEAD if HEAD in checkpoint.tensors else EMBEDDING


def _refuse_strangers(checkpoint: Checkpoint, layers: LayerRange, expected: set[str]) -> None:
    own = {f"model.layers.{index}" for index in range(layers.start, layers.end)}
    for name in checkpoint.tensors:
        # Early Llama checkpoints store the rotation's frequencies, which follow from the configuration.
        if name in expected or name.endswith(".rotary_emb.inv_freq"):
            continue
        if ".".join(name.split(".")[:3]) in own:
            raise CheckpointError(
                f"{name} is not a tensor of a layer of model_type {checkpoint.config.family!r} with this config.json",
                field=name,
            )
