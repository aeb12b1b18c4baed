"""The router's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stagecoach.config import ProcessSettings


class RouterSettings(ProcessSettings):
    """Serves a model whose layers are spread over shards."""

    shards: str = Field(description="HOST:PORT of every shard, separated by commas, in any order")
    listen: str = Field("127.0.0.1:50050", description="HOST:PORT; port 0 lets the system choose")
    model: Path | None = Field(None, description="folder with the tokenizer; unset: fetched from the first shard")
    model_name: str | None = Field(None, description="what callers call the model; unset: the checkpoint folder's name")
    max_batch_tokens: int = Field(512, ge=1, le=65536, description="most tokens in one micro-batch")
    max_running: int = Field(256, ge=1, le=4096, description="most sequences that run at a time")
    max_waiting: int = Field(1024, ge=1, le=1_000_000, description="most sequences that wait; more are refused")
    lanes: int = Field(
        0,
        ge=0,
        le=64,
        description="most micro-batches in flight, at least one a stage; 0: by what steps are measured to take",
    )
    kv_blocks: int = Field(0, ge=0, description="K/V blocks to lease from every shard; 0: all that are free")
    recovery_timeout_s: float = Field(
        60.0, gt=0, description="how long requests wait for a broken pipeline to come back"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
