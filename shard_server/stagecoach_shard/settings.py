"""The shard server's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stagecoach.errors import InvalidArgument
from stagecoach.process.link_settings import LinkSettings
from stagecoach.security.tls import ROUTER_NAME, SHARD_NAME
from stagecoach.topology import LayerRange

AUTO_LAYERS = "auto"


class ShardSettings(LinkSettings):
    """Serves a contiguous block of a model's layers."""

    model: Path = Field(description="checkpoint folder: config.json and safetensors")
    layers: str = Field(
        description="START:END, half-open, 0:15 is the first fifteen layers; auto: those that a router assigns"
    )
    listen: str = Field("127.0.0.1:50051", description="HOST:PORT; port 0 lets the system choose")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu or cuda:N")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of weights, K/V and hidden states"
    )
    kv_cache_memory: str | None = Field(None, description="for example 2G; unset: kv-cache-fraction of the free memory")
    kv_cache_fraction: float = Field(0.3, gt=0, le=0.95, description="of the device's free memory after loading")
    block_size: int = Field(16, ge=1, le=1024, description="positions in a K/V block; the same on all shards")
    max_batch_tokens: int = Field(4096, ge=1, le=65536, description="most tokens in one micro-batch")
    max_queued_steps: int = Field(8, ge=1, le=1024, description="micro-batches that may wait here")
    threads: int = Field(1, ge=1, le=1024, description="compute threads on the CPU")
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: our own, for bfloat16 on a CPU with a C compiler; auto: native where possible",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="how long routers may go on with the leases they have when the shard is told to stop"
    )
    allow_peer: str = Field(
        f"{ROUTER_NAME},{SHARD_NAME}",
        description="with TLS: names, separated by commas; a caller's certificate must have one of them",
    )
    allow_assign: str = Field(
        ROUTER_NAME, description="with TLS and --layers auto: of the names in allow-peer, those that may assign layers"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def layer_range(self) -> LayerRange | None:
        """The range that `layers` names, or None where a router assigns one. Raises InvalidArgument."""
        if self.layers.strip() == AUTO_LAYERS:
            return None
        try:
            return LayerRange.parse(self.layers)
        except InvalidArgument as error:
            message = f"{error.message}; or {AUTO_LAYERS}, for those that a router assigns"
            raise InvalidArgument(message, field=error.field, value=error.value) from None
