"""What the processes of a cluster on this machine are started with, and where they listen."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stagecoach.errors import ConfigError
from stagecoach.rpc.channel import split_address
from stagecoach.topology import LayerRange

if TYPE_CHECKING:
    from stagecoach_local.certificates import ClusterCertificates, Issued

# Who stops a whole cluster wants it to stop: what runs gets a moment to end, well within the time for all of them.
DRAIN_TIMEOUT_S = 2.0
# Of this machine's free memory, for all shards together: each would take its own default of the same memory.
KV_CACHE_FRACTION = 0.3
# What a shard is told that loads its layers when a router says which.
AUTO_LAYERS = "auto"
_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


class Commands(Protocol):
    """What the processes are started with."""

    def shard(self, index: int, layers: LayerRange | None, address: str) -> Sequence[str]:
        """The `index`th of all shards; `layers` None is a spare."""
        ...

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class StagecoachCommands:
    """The real shard server and router, of this Python installation."""

    model: Path
    device: str = "cpu"  # cpu, cuda, cuda:N; or one for each shard, separated by commas, which begin anew at their end
    dtype: str = "bfloat16"
    kv_cache_memory: str | None = None  # of each shard, for example 2G; None: an even share of KV_CACHE_FRACTION
    num_shards: int = 1  # that share the memory, spares included
    threads_per_shard: int = 1
    certificates: ClusterCertificates | None = None
    edge_tls: bool = False  # callers, too, speak TLS to the router
    insecure_listen: bool = False

    def shard(self, index: int, layers: LayerRange | None, address: str) -> Sequence[str]:
        devices = self.device.split(",")
        command = [sys.executable, "-m", "stagecoach_shard", "--model", str(self.model)]
        command += ["--layers", AUTO_LAYERS if layers is None else str(layers)]
        command += ["--listen", address, "--device", devices[index % len(devices)], "--dtype", self.dtype]
        command += ["--threads", str(self.threads_per_shard), "--drain-timeout-s", f"{DRAIN_TIMEOUT_S:g}"]
        if self.certificates is not None:
            command += _identity(self.certificates.shard, self.certificates.ca)
        if self.kv_cache_memory is not None:
            return [*command, "--kv-cache-memory", self.kv_cache_memory]
        return [*command, "--kv-cache-fraction", f"{KV_CACHE_FRACTION / self.num_shards:.4f}"]

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        command = [sys.executable, "-m", "stagecoach_router", "--shards", ",".join(shard_addresses)]
        command += ["--listen", address, "--drain-timeout-s", f"{DRAIN_TIMEOUT_S:g}"]
        if self.certificates is not None:
            command += _identity(self.certificates.router, self.certificates.ca)
            command += [] if self.edge_tls else ["--no-edge-tls"]
        return [*command, "--insecure-listen"] if self.insecure_listen else command


def free_addresses(wanted: Sequence[str]) -> list[str]:
    """The `wanted` addresses, each port 0 made a free one. Somebody else may still take one before it is used.

    Raises ConfigError for an address that cannot be listened on.
    """
    addresses = []
    with contextlib.ExitStack() as held:  # all at a time, so that no two get the same port
        for address in wanted:
            host, port = split_address(address, "listen")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            try:
                listener = held.enter_context(socket.create_server((host.strip("[]"), port), family=family))
            except OSError as error:
                text = f"cannot listen on {address}: {error.strerror or error}"
                raise ConfigError(text, field="listen", value=address) from error
            addresses.append(f"{host}:{listener.getsockname()[1]}")
    return addresses


def address_to_call(listen: str) -> str:
    """Where what listens on `listen` is called from this machine."""
    host, port = split_address(listen, "listen")
    return f"{_WILDCARD_HOSTS.get(host, host)}:{port}"


def even_threads(num_shards: int) -> int:
    """Of each of so many shards that compute at the same time: an even share of the cores, at least one."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_shards)


def _identity(own: Issued, ca: Path) -> list[str]:
    return ["--tls-cert", str(own.cert), "--tls-key", str(own.key), "--tls-ca", str(ca)]
