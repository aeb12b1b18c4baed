"""Which processes a cluster consists of: what they are called, how they are started and where they listen. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagecoach.topology import LayerRange
from stagecoach_local.addresses import address_to_call
from stagecoach_local.commands import Commands
from stagecoach_local.process import Process


def plan_processes(
    layers: Sequence[LayerRange],
    replicas: int,
    spares: int,
    commands: Commands,
    shard_addresses: Sequence[str],
    listen: str,
    on_line: Callable[[str, str], None] | None = None,
) -> list[Process]:
    """The processes, none of them started: the shards, pipeline by pipeline, then the spares, then the router.

    `layers` are the ranges of one pipeline. The router listens on `listen`, the shards on an address each.
    """
    processes = []
    layers_of_all: list[LayerRange | None] = [*list(layers) * replicas, *[None] * spares]
    for index, (own, address) in enumerate(zip(layers_of_all, shard_addresses, strict=True)):
        replica, stage = divmod(index, len(layers))
        command = commands.shard(index, own, address)
        if own is None:
            name = f"spare {index - replicas * len(layers) + 1}"
            processes.append(Process(name, "spare", command, address, None, on_line))
        else:
            name = f"shard {layers[stage]}" + (f" #{replica + 1}" if replicas > 1 else "")
            processes.append(Process(name, "shard", command, address, own, on_line))
    command = commands.router(shard_addresses, listen)
    return [*processes, Process("router", "router", command, address_to_call(listen), None, on_line)]
