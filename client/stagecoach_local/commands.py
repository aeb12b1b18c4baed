"""The command lines that the processes of a cluster on this machine are started with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stagecoach.topology import LayerRange

if TYPE_CHECKING:
    from stagecoach_local.certificates import ClusterCertificates, Issued

# Whoever stops a whole cluster wants it to stop now: running requests get a moment to end, and no more.
DRAIN_TIMEOUT_S = 2.0
# The part of this machine's free memory that all shards get together. By itself each would take a part of the whole.
KV_CACHE_FRACTION = 0.3
# The value of --layers for a shard that loads its layers when a router says which.
AUTO_LAYERS = "auto"


class Commands(Protocol):
    """The command lines of a cluster's processes."""

    def shard(self, index: int, layers: LayerRange | None, address: str) -> Sequence[str]:
        """Starts shard number `index` of the cluster, which listens on `address`. A spare has no `layers`."""
        ...

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        """Starts the router, which listens on `address`."""
        ...


@dataclass(frozen=True, slots=True)
class StagecoachCommands:
    """Commands for the shard server and the router of this Python installation."""

    model: Path
    device: str = "cpu"  # cpu, cuda or cuda:N; or several, separated by commas, which the shards take in turn
    dtype: str = "bfloat16"
    kv_cache_memory: str | None = None  # for each shard, for example 2G; None: an even share of KV_CACHE_FRACTION
    num_shards: int = 1  # how many share the memory, spares included
    threads_per_shard: int = 1
    certificates: ClusterCertificates | None = None
    edge_tls: bool = False  # callers speak TLS to the router as well
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


def even_threads(num_shards: int) -> int:
    """How many threads each of so many shards gets that compute at the same time: an even share, at least one."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_shards)


def _identity(own: Issued, ca: Path) -> list[str]:
    return ["--tls-cert", str(own.cert), "--tls-key", str(own.key), "--tls-ca", str(ca)]
