"""What a router says about its models, its pipelines and itself, and how it is read off the wire. Pure.

What the counters in it come to over an interval (how busy a stage was, what a token cost) is in activity.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from stagecoach.v1 import inference_pb2, model_pb2
from stagecoach_client.counters import RouterCounters, StageCounters, busy_fraction


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served."""

    name: str
    family: str  # the `model_type` of the checkpoint's config.json
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int  # the most positions of a sequence, prompt and output together


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus(StageCounters):
    """One stage of a pipeline: which process serves it, what it holds, and what it has done."""

    address: str
    first_layer: int
    end_layer: int  # the first layer after those that it holds
    device: str
    kernels: str  # what computes its layers: "native" or "torch"
    dtype: str
    pid: int
    hostname: str
    weights_bytes: int
    kv_cache_bytes: int
    queue_depth: int  # steps that wait for its compute thread now

    @property
    def busy_fraction(self) -> float | None:
        """The share of its time in which the compute thread computed; None before it did anything."""
        return busy_fraction(self)


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    """A chain of shards that covers a model."""

    model: Model
    epoch: int
    ready: bool
    reason: str  # why it is not ready; empty where it is
    stages: tuple[StageStatus, ...]
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class SpareStatus:
    """A shard that is in no pipeline now."""

    address: str
    first_layer: int  # 0, as is end_layer, where it has no layers or the router does not know them
    end_layer: int  # the first layer after those that it holds
    assignable: bool  # whether a router may give it other layers
    reason: str  # why it cannot take part; empty where it can
    pid: int = 0  # 0 where it has not answered yet

    @property
    def has_layers(self) -> bool:
        """Whether it is known to hold any layers."""
        return self.end_layer > self.first_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus(RouterCounters):
    """A router and its pipelines as they are now, and what the router has done since it started."""

    pipelines: tuple[PipelineStatus, ...]
    spares: tuple[SpareStatus, ...]
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    block_size: int  # tokens in a block
    uptime_s: float

    @property
    def num_ready(self) -> int:
        """How many pipelines can take requests."""
        return sum(pipeline.ready for pipeline in self.pipelines)

    @property
    def ready(self) -> bool:
        """Whether at least one pipeline can take requests."""
        return self.num_ready > 0

    def serving_pipeline(self, address: str) -> int | None:
        """The index in `pipelines` of the ready one that the shard at `address` is in; None where there is none."""
        for index, pipeline in enumerate(self.pipelines):
            if pipeline.ready and any(stage.address == address for stage in pipeline.stages):
                return index
        return None


def read_models(response: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """A ListModelsResponse as values."""
    return tuple(Model(**_same_named(Model, model)) for model in response.models)


def read_status(response: inference_pb2.GetClusterStatusResponse) -> ClusterStatus:
    """A GetClusterStatusResponse as a value."""
    return ClusterStatus(
        **_same_named(ClusterStatus, response, but=("pipelines", "spares")),
        pipelines=tuple(_read_pipeline(pipeline) for pipeline in response.pipelines),
        spares=tuple(_read_spare(spare) for spare in response.spares),
    )


def _read_pipeline(pipeline: inference_pb2.PipelineStatus) -> PipelineStatus:
    return PipelineStatus(
        **_same_named(PipelineStatus, pipeline, but=("model", "stages")),
        model=Model(**_same_named(Model, pipeline.model)),
        stages=tuple(_read_stage(stage) for stage in pipeline.stages),
    )


def _read_spare(spare: inference_pb2.SpareStatus) -> SpareStatus:
    return SpareStatus(
        spare.address, spare.layers.start, spare.layers.end, spare.assignable, spare.reason, pid=spare.pid
    )


def _read_stage(stage: inference_pb2.StageStatus) -> StageStatus:
    return StageStatus(
        **_same_named(StageStatus, stage, but=("first_layer", "end_layer", "dtype")),
        first_layer=stage.layers.start,
        end_layer=stage.layers.end,
        dtype=_dtype_name(stage.dtype),
    )


def _same_named(kind: type, message: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Those fields of the dataclass `kind` that the message has under the same name: all but those of `but`."""
    return {each.name: getattr(message, each.name) for each in fields(kind) if each.name not in but}


def _dtype_name(dtype: int) -> str:
    value = model_pb2.DType.DESCRIPTOR.values_by_number.get(dtype)
    if value is None or dtype == model_pb2.DTYPE_UNSPECIFIED:
        return "unknown"
    return str(value.name).removeprefix("DTYPE_").lower()
