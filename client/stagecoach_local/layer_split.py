"""Which layers go to which stage when a model is split over equal processes of one machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach.errors import CheckpointError, InvalidArgument
from stagecoach.topology import LayerRange, order_stages, split_evenly


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the split needs to know of a model."""

    num_layers: int
    head_layers: int = 0  # as many layers cost the last stage as much as its head does


def read_shape(model: Path) -> ModelShape:
    """The shape of the checkpoint in the folder `model`. Raises CheckpointError."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"{model} is not a checkpoint folder: cannot read {path.name}: {reason}"
        raise CheckpointError(text, field="model", value=model) from error
    # The facts are at the top or, for a model that also takes pictures, in the part about text.
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        if isinstance(part, dict) and (num_layers := _count(part, "num_hidden_layers") or _count(part, "n_layer")):
            return ModelShape(num_layers, _head_layers(part))
    raise CheckpointError(f"{path} does not say num_hidden_layers", field="model", value=model)


def split_layers(stages: int | str | Sequence[LayerRange], shape: ModelShape) -> tuple[LayerRange, ...]:
    """The layer ranges of a pipeline, in order. `stages` is their number, or says them itself ("0:10,10:30")."""
    if isinstance(stages, str):
        if ":" in stages:
            stages = [LayerRange.parse(part) for part in stages.split(",")]
        else:
            try:
                stages = int(stages)
            except ValueError as error:
                text = f"stages must be a number, or layer ranges such as 0:10,10:30; got {stages!r}"
                raise InvalidArgument(text, field="stages", value=stages) from error
    if isinstance(stages, int):
        return tuple(split_evenly(shape.num_layers, stages, shape.head_layers))
    return tuple(stages[index] for index in order_stages(stages, shape.num_layers))


def _head_layers(config: dict[str, Any]) -> int:
    """How many layers the head is worth: half of its weights over a layer's.

    Half, because all tokens of decoding go through the head, but of a prompt only the last one.
    """
    hidden, inner, vocab = (_count(config, name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    num_heads = _count(config, "num_attention_heads")
    if not (hidden and inner and vocab and num_heads):
        return 0
    head_dim = _count(config, "head_dim") or hidden // num_heads
    num_kv_heads = _count(config, "num_key_value_heads") or num_heads
    layer = 2 * hidden * head_dim * (num_heads + num_kv_heads) + 3 * hidden * inner
    return round(vocab * hidden / layer / 2)


def _count(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else 0
