"""Layer ranges, and whether shards make a whole pipeline. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stagecoach.errors import InvalidArgument, TopologyError


@dataclass(frozen=True, order=True, slots=True)
class LayerRange:
    """Transformer layers [start, end), half-open."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InvalidArgument(
                f"layers {self.start}:{self.end} is empty or negative; give START:END with 0 <= START < END",
                field="layers",
                value=f"{self.start}:{self.end}",
            )

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """Reads "START:END"."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
        if match is None:
            raise InvalidArgument(
                f"layers must be START:END, for example 0:15; got {text!r}", field="layers", value=text
            )
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def split_evenly(num_layers: int, num_stages: int, head_layers: int = 0) -> list[LayerRange]:
    """`num_stages` ranges that cover [0, num_layers), as even as can be; earlier ones have the odd layers.

    The last stage also computes the head, which costs as much as `head_layers` layers, and gets so many fewer.
    """
    if not 1 <= num_stages <= num_layers:
        raise InvalidArgument(
            f"{num_layers} layers cannot be split over {num_stages} stages",
            field="stages",
            limit=num_layers,
            value=num_stages,
        )
    last = max(1, (num_layers + head_layers) // num_stages - head_layers) if num_stages > 1 else num_layers
    size, extra = divmod(num_layers - last, max(1, num_stages - 1))
    sizes = [size + (stage < extra) for stage in range(num_stages - 1)] + [last]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [LayerRange(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def order_stages(ranges: Sequence[LayerRange], num_layers: int) -> list[int]:
    """The indices of `ranges` in pipeline order.

    Raises TopologyError, naming the layers, unless the ranges cover [0, num_layers) exactly once.
    """
    order = sorted(range(len(ranges)), key=lambda index: ranges[index])
    expected = 0
    for index in order:
        layers = ranges[index]
        if layers.start > expected:
            raise TopologyError(
                f"no shard serves layers {expected}:{layers.start}",
                field="shards",
                limit=f"0:{num_layers}",
                value=str(layers),
            )
        if layers.start < expected:
            raise TopologyError(
                f"layers {layers.start}:{min(expected, layers.end)} are served by more than one shard",
                field="shards",
                limit=f"0:{num_layers}",
                value=str(layers),
            )
        expected = layers.end
    if expected < num_layers:
        raise TopologyError(f"no shard serves layers {expected}:{num_layers}", field="shards", limit=f"0:{num_layers}")
    if expected > num_layers:
        raise TopologyError(
            f"layers {num_layers}:{expected} are served, and the model has {num_layers}",
            field="shards",
            limit=f"0:{num_layers}",
        )
    return order
