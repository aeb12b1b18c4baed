"""Loads a range of layers: its weights, its K/V memory, its compute thread. This may take minutes, on a thread."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass

import torch
from tqdm import tqdm

from stagecoach.errors import ConfigError, Unavailable
from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.memory import free_bytes, num_kv_blocks
from stagecoach_shard.models.graphed_layers import MAX_GATHERED_BYTES
from stagecoach_shard.models.stage_tensors import StageTensors
from stagecoach_shard.native.layers import Kernels, native_library
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.stage_runner import StageRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loader:
    """An open checkpoint, and how its layers are to be loaded."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    num_threads: int  # of the compute thread, on a CPU
    block_size: int  # positions in a K/V block
    kv_cache_memory: str | None  # a size such as "2G"; None: `kv_cache_fraction` of what is free after loading
    kv_cache_fraction: float
    abandoned: threading.Event  # set: a load ends at the next tensor

    def check_kernels(self) -> None:
        """Finds out before any layers are known whether they can be computed as asked. Raises ConfigError."""
        native_library(self.kernels, self.checkpoint.config, self.dtype, self.device)

    def load(self, layers: LayerRange) -> StageRunner:
        """Loads the stage of `layers`, takes K/V memory out of what is then free, and starts the compute thread.

        Raises Unavailable where the load was abandoned, what `Stage.load` raises, CheckpointError where the files have
        changed since the checkpoint was opened, and ConfigError where weights or K/V memory do not fit.
        """
        self.checkpoint.weight_stamps.check()
        self._check_room(layers)
        self.checkpoint.names_read.clear()
        with tqdm(desc=f"layers {layers}", unit="tensor", disable=None, leave=False) as bar:

            def progress(done: int, total: int) -> None:
                if self.abandoned.is_set():
                    raise Unavailable("the shard is stopping")
                bar.total = total
                bar.update(done - bar.n)

            stage = Stage.load(
                self.checkpoint,
                layers,
                dtype=self.dtype,
                device=self.device,
                progress=progress,
                kernels=self.kernels,
            )
        self.checkpoint.weight_stamps.check()  # again: weights of two models may have been read
        cache = self._allocate(layers)
        logger.info(
            "%s layers %s on %s (%s kernels): weights %.0f MiB, K/V %.0f MiB in %d blocks of %d",
            self.checkpoint.name,
            layers,
            self.device,
            "native" if stage.is_native else "torch",
            stage.weights_bytes / 2**20,
            cache.total_bytes / 2**20,
            cache.num_blocks,
            cache.block_size,
        )
        runner = StageRunner(stage, cache, num_threads=self.num_threads)
        runner.start()
        return runner

    def _check_room(self, layers: LayerRange) -> None:
        """Raises ConfigError where the weights are larger than what is free.

        A system that promises more memory than it has would end the process in the middle of reading them.
        """
        needed = StageTensors.of(self.checkpoint, layers).num_bytes(self.checkpoint, self.dtype)
        free = free_bytes(self.device)
        if needed > free:
            raise ConfigError(
                f"layers: {layers} take {needed} bytes, {free} free", field="layers", limit=free, value=needed
            )

    def _allocate(self, layers: LayerRange) -> KVCache:
        config = self.checkpoint.config
        reserved = MAX_GATHERED_BYTES if self.device.type == "cuda" else 0  # for recorded decodes
        num_blocks = num_kv_blocks(
            self.kv_cache_memory,
            self.kv_cache_fraction,
            bytes_per_block=KVCache.bytes_per_block(config, layers, block_size=self.block_size, dtype=self.dtype),
            free=max(0, free_bytes(self.device) - reserved),
        )
        return KVCache.allocate(
            config,
            layers,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self.dtype,
            device=self.device,
        )


def check_threads(num_threads: int, device: torch.device) -> None:
    """Warns where the CPU has fewer cores than the step has threads: they wait for each other at every product."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or num_threads
    if device.type == "cpu" and num_threads > num_cores:
        logger.warning(
            "threads: %d, and this process may use %d cores: each step takes several times as long as with %d threads",
            num_threads,
            num_cores,
            num_cores,
        )


def find_device(name: str) -> torch.device:
    """The device `name`, such as "cpu" or "cuda:1". Raises ConfigError for one that this machine does not have."""
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"device: {name}: this machine has {count} CUDA devices", field="device", limit=count, value=name
        )
    return device
