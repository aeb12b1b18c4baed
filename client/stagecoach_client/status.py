"""What a router says about its models and its pipelines, and how it is read off the wire. Pure.

What it comes to over an interval (how busy a stage was, what a token cost) is in activity.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach.v1 import inference_pb2, model_pb2


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served."""

    name: str
    family: str  # the `model_type` of the checkpoint's config.json
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int  # positions of a sequence, prompt and output together


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage of a pipeline. Counts and times (in seconds) are since the router first heard of it, and only rise."""

    address: str
    first_layer: int
    end_layer: int  # the first one that it does not hold
    device: str
    kernels: str  # "native" or "torch"
    dtype: str
    pid: int
    hostname: str
    weights_bytes: int
    kv_cache_bytes: int
    num_steps: int
    num_tokens: int
    compute_s: float  # the compute thread worked on a step
    wait_s: float  # it did not
    queue_s: float  # summed over the steps: how long each had arrived before the compute thread took it
    decode_s: float  # reading and checking frames
    encode_s: float  # writing frames
    queue_depth: int  # now
    num_frames: int  # read
    num_fast_frames: int  # of them, those whose payload was read without a copy

    @property
    def busy_fraction(self) -> float | None:
        """The share of its time that the compute thread computed; None before it did anything."""
        return busy_fraction(self.compute_s, self.wait_s)


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    """A chain of shards that covers a model."""

    model: Model
    epoch: int
    ready: bool
    reason: str  # why it is not ready
    stages: tuple[StageStatus, ...]
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class SpareStatus:
    """A shard that is in no pipeline now."""

    address: str
    first_layer: int  # as end_layer 0 where it has no layers, or where they are not known
    end_layer: int  # the first one that it does not hold
    assignable: bool  # it may be given other layers than it has
    reason: str  # why it cannot take part; empty where it can

    @property
    def has_layers(self) -> bool:
        """Whether it is known to hold any."""
        return self.end_layer > self.first_layer


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A router and its pipelines, now; counts are since it started."""

    pipelines: tuple[PipelineStatus, ...]
    num_running: int
    num_waiting: int
    num_finished: int
    num_preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    uptime_s: float
    looked_up_prompt_tokens: int  # in the prefix cache; cached_prompt_tokens of them were there
    num_repeats: int  # draws that fell outside of the candidates, each of which cost a whole row
    active_s: float  # the time in which at least one sequence ran
    num_results: int  # that the last stage sent back
    result_payload_bytes: int
    result_bytes: int  # the whole messages
    num_frames: int  # that the router read from its shards
    num_fast_frames: int
    spares: tuple[SpareStatus, ...]

    @property
    def num_ready(self) -> int:
        """The pipelines that can take requests."""
        return sum(pipeline.ready for pipeline in self.pipelines)

    @property
    def ready(self) -> bool:
        """Whether at least one pipeline can take requests."""
        return self.num_ready > 0

    def serving_pipeline(self, address: str) -> int | None:
        """The ready pipeline that the shard at `address` is in, as `pipelines` has them; None: it is in none."""
        for index, pipeline in enumerate(self.pipelines):
            if pipeline.ready and any(stage.address == address for stage in pipeline.stages):
                return index
        return None


def busy_fraction(compute_s: float, wait_s: float) -> float | None:
    """compute / (compute + wait), or None when both are zero."""
    total_s = compute_s + wait_s
    return compute_s / total_s if total_s > 0 else None


def read_model(model: model_pb2.ModelDescription) -> Model:
    """A ModelDescription as a value."""
    return Model(
        name=model.name,
        family=model.family,
        fingerprint=model.fingerprint,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
    )


def read_models(response: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """A ListModelsResponse as values."""
    return tuple(read_model(model) for model in response.models)


def read_status(response: inference_pb2.GetClusterStatusResponse) -> ClusterStatus:
    """A GetClusterStatusResponse as a value."""
    return ClusterStatus(
        pipelines=tuple(
            PipelineStatus(
                model=read_model(pipeline.model),
                epoch=pipeline.epoch,
                ready=pipeline.ready,
                reason=pipeline.reason,
                stages=tuple(_read_stage(stage) for stage in pipeline.stages),
                num_running=pipeline.num_running,
                num_waiting=pipeline.num_waiting,
            )
            for pipeline in response.pipelines
        ),
        num_running=response.num_running,
        num_waiting=response.num_waiting,
        num_finished=response.num_finished,
        num_preemptions=response.num_preemptions,
        prompt_tokens=response.prompt_tokens,
        cached_prompt_tokens=response.cached_prompt_tokens,
        completion_tokens=response.completion_tokens,
        num_blocks=response.num_blocks,
        num_free_blocks=response.num_free_blocks,
        block_size=response.block_size,
        uptime_s=response.uptime_s,
        looked_up_prompt_tokens=response.looked_up_prompt_tokens,
        num_repeats=response.num_repeats,
        active_s=response.active_s,
        num_results=response.num_results,
        result_payload_bytes=response.result_payload_bytes,
        result_bytes=response.result_bytes,
        num_frames=response.num_frames,
        num_fast_frames=response.num_fast_frames,
        spares=tuple(
            SpareStatus(spare.address, spare.layers.start, spare.layers.end, spare.assignable, spare.reason)
            for spare in response.spares
        ),
    )


def _read_stage(stage: inference_pb2.StageStatus) -> StageStatus:
    return StageStatus(
        address=stage.address,
        first_layer=stage.layers.start,
        end_layer=stage.layers.end,
        device=stage.device,
        kernels=stage.kernels,
        dtype=_dtype_name(stage.dtype),
        pid=stage.pid,
        hostname=stage.hostname,
        weights_bytes=stage.weights_bytes,
        kv_cache_bytes=stage.kv_cache_bytes,
        num_steps=stage.num_steps,
        num_tokens=stage.num_tokens,
        compute_s=stage.compute_s,
        wait_s=stage.wait_s,
        queue_s=stage.queue_s,
        decode_s=stage.decode_s,
        encode_s=stage.encode_s,
        queue_depth=stage.queue_depth,
        num_frames=stage.num_frames,
        num_fast_frames=stage.num_fast_frames,
    )


def _dtype_name(dtype: int) -> str:
    value = model_pb2.DType.DESCRIPTOR.values_by_number.get(dtype)
    if value is None or dtype == model_pb2.DTYPE_UNSPECIFIED:
        return "unknown"
    return str(value.name).removeprefix("DTYPE_").lower()
