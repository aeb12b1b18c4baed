"""The router's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from stagecoach.process.link_settings import LinkSettings
from stagecoach_router.pipelines.pipeline_manager import MAX_LEASED_BLOCKS


class RouterSettings(LinkSettings):
    """Serves a model whose layers are spread over shards."""

    shards: str = Field(
        description="HOST:PORT of every shard, separated by commas, in any order; what one pipeline does not need "
        "makes further ones, or stands by with the layers of a stage"
    )
    stages: int = Field(
        0, ge=0, le=1024, description="of a pipeline of shards that have no layers of their own; 0: all of these shards"
    )
    replicas: int = Field(
        0,
        ge=0,
        le=1024,
        description="pipelines for which shards without layers load some; 0: one; the others stand by as spares, with "
        "the layers of a stage each",
    )
    listen: str = Field("127.0.0.1:50050", description="HOST:PORT; port 0 lets the system choose")
    model: Path | None = Field(None, description="folder with the tokenizer; unset: fetched from a shard that has it")
    model_name: str | None = Field(None, description="what callers call the model; unset: the checkpoint folder's name")
    max_batch_tokens: int = Field(512, ge=1, le=65536, description="most tokens in one micro-batch")
    max_running: int = Field(256, ge=1, le=4095, description="most sequences that run at a time")
    max_waiting: int = Field(1024, ge=1, le=1_000_000, description="most sequences that wait; more are refused")
    lanes: int = Field(
        0,
        ge=0,
        le=64,
        description="most micro-batches in flight, at least one a stage; 0: by what steps are measured to take",
    )
    kv_blocks: int = Field(
        0,
        ge=0,
        lt=MAX_LEASED_BLOCKS,
        description=f"K/V blocks to lease from every shard; 0: all that are free, at most {MAX_LEASED_BLOCKS}",
    )
    recovery_timeout_s: float = Field(
        60.0, gt=0, description="how long requests wait for a broken pipeline to come back"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="how long running requests have to end when the router is told to stop"
    )
    max_linger_s: float = Field(
        60.0, ge=0, description="how long, at most, a request runs on for a caller whose connection broke"
    )
    max_stall_s: float = Field(
        60.0, gt=0, description="a caller that takes nothing of its answer for so long is cut off"
    )
    fault_timeout_s: float = Field(
        5.0,
        ge=0.1,
        le=3600.0,
        description="within it a shard that hangs or is cut off is found; more than the largest message takes",
    )
    step_timeout_s: float = Field(
        120.0, gt=0, description="longest that a shard may compute a step of which it is not known how long it takes"
    )
    probe_interval_s: float = Field(
        1.0, gt=0, le=3600.0, description="without a request, one token is generated so often to see that it can be"
    )
    journal: Path | None = Field(
        None, description="SQLite file in which accepted requests outlive the router; unset: they do not"
    )
    tls_client_ca: Path | None = Field(
        None, description="PEM: callers must show a certificate of this CA; unset: they need none"
    )
    edge_tls: CliImplicitFlag[bool] = Field(
        True, description="with TLS to the shards, speak TLS to callers, too; needless on loopback"
    )
    api_keys: Path | None = Field(
        None, description="file of API keys, see `stagecoach keys new`; unset: whoever reaches the port is let in"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
