"""A stage: a contiguous range of a model's layers, with the embedding if it is the first, the head if the last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import Attention
from stagecoach_shard.attention.sdpa import SdpaAttention
from stagecoach_shard.checkpoints.checkpoint import Checkpoint, TensorReader
from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.memory import give_back_unused
from stagecoach_shard.models.decoder import TorchLayers
from stagecoach_shard.models.graphed_layers import GraphedLayers
from stagecoach_shard.models.interface import Layers
from stagecoach_shard.models.linear import Linear
from stagecoach_shard.models.rms_norm import RMSNorm
from stagecoach_shard.models.stage_tensors import FINAL_NORM, StageTensors
from stagecoach_shard.native.layers import Kernels, NativeLayers, NativeLinear, native_library


class Stage:
    """The weights of `layers`, and the arithmetic. Holds no state of any sequence; that is in the KVCache."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        reader: TensorReader,
        tensors: StageTensors,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention | None,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.layers = layers
        self.dtype = dtype
        self.device = device
        self.is_first = layers.start == 0
        self.is_last = layers.end == config.num_layers
        library = None if attention is not None else native_library(kernels, config, dtype, device)
        table = [config.vocab_size, config.hidden_size]
        self._embedding = reader.read(tensors.embedding, table) if self.is_first else None
        self._layers: Layers
        if library is not None:
            self._layers = NativeLayers(config, layers, reader, library)
        else:
            in_torch = TorchLayers(
                config, layers, reader, dtype=dtype, device=device, attention=attention or SdpaAttention()
            )
            is_recorded = device.type == "cuda" and attention is None
            self._layers = GraphedLayers(in_torch, dtype=dtype, device=device) if is_recorded else in_torch
        self.is_native = library is not None
        self._norm: RMSNorm | None = None
        self._head: Linear | NativeLinear | None = None
        self._is_tied = False  # head and embedding are both here, and one tensor
        if self.is_last:
            self._norm = RMSNorm(reader.read(FINAL_NORM, [config.hidden_size]), config.rms_norm_eps)
            tied = self._embedding if tensors.head == tensors.embedding else None
            self._is_tied = tied is not None
            head = reader.read(tensors.head, table) if tied is None else tied
            self._head = Linear(head) if library is None else NativeLinear(head, None, library)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
        attention: Attention | None = None,
        kernels: Kernels = "auto",
    ) -> Stage:
        """Reads the tensors of `layers` and no others. `progress` is told (tensors done, tensors in all) after each.

        `kernels`: see `native_library`; an `attention` of one's own means torch.

        Raises TopologyError for layers that the model does not have, CheckpointError for tensors that are missing, of
        another shape than the configuration's, not floating point, or not expected in a layer.
        """
        tensors = StageTensors.of(checkpoint, layers)
        num_done = 0

        def on_read() -> None:
            nonlocal num_done
            num_done += 1
            if progress is not None:
                progress(num_done, len(tensors.names))

        with torch.inference_mode(), checkpoint.reader(dtype, device, on_read) as reader:
            stage = cls(
                checkpoint.config,
                layers,
                reader,
                tensors,
                dtype=dtype,
                device=device,
                attention=attention,
                kernels=kernels,
            )
        assert num_done == len(tensors.names)
        give_back_unused()
        return stage

    @property
    def weights_bytes(self) -> int:
        """What the weights take in memory."""
        tables = [0 if self._embedding is None else self._embedding.nbytes]
        if self._norm is not None and self._head is not None:
            tables.append(self._norm.num_bytes)
            # Where head and embedding are one tensor it counts once, unless the head was packed into a copy.
            is_copy = isinstance(self._head, NativeLinear) or self._head.packed
            tables.append(0 if self._is_tied and not is_copy else self._head.num_bytes)
        return sum(tables) + self._layers.num_bytes

    @torch.inference_mode()
    def forward(self, inputs: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """Runs the layers over one micro-batch and writes its K/V into `cache`.

        `inputs`: token ids, any integer dtype, [num_tokens], on the first stage; elsewhere hidden states
        [num_tokens, hidden_size] of the stage's dtype. They may be on another device, and are not written to.
        Returns hidden states [num_tokens, hidden_size] on the stage's device; on the last stage still without the final
        norm, which `logits` applies to those rows that need it.

        Trusts what it is given: token ids, positions and blocks were checked when they came from the wire.
        """
        assert len(cache.layers) == len(self.layers)
        assert cache.block_size == batch.block_size
        assert len(inputs) == batch.total_tokens
        batch = batch.to(self.device)
        hidden_states = inputs.to(self.device, non_blocking=True)
        if self._embedding is not None:
            hidden_states = functional.embedding(hidden_states.long(), self._embedding)
        return self._layers.forward(hidden_states, batch, cache)

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm and head, on the last stage only: [n, hidden_size] -> [n, vocab_size]; float32 where native."""
        assert self._norm is not None
        assert self._head is not None
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty(0, self.config.vocab_size)
        return self._head(self._norm(hidden_states))
