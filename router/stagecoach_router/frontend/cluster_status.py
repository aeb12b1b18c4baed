"""What a cluster is made of and what it did, as its status says it."""

from __future__ import annotations

from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_router.engine.engine import Engine
from stagecoach_router.engine.replica import Replica
from stagecoach_router.metrics.counters import PipelineTotals, StageTotals
from stagecoach_router.pipelines.pipeline_manager import PipelineManager
from stagecoach_router.pipelines.shard import Shard
from stagecoach_router.pipelines.stage_session import StageSession


def write_status(
    model: model_pb2.ModelDescription, engine: Engine, pipelines: PipelineManager, uptime_s: float
) -> pb.GetClusterStatusResponse:
    """The whole status. Blocks and counters are those of all pipelines together."""
    totals = pipelines.totals
    counters = engine.counters
    blocks = [replica.scheduler.blocks for replica in engine.replicas]
    response = pb.GetClusterStatusResponse(
        num_running=engine.num_running,
        num_waiting=engine.num_waiting,
        num_finished=counters.num_finished,
        num_preemptions=sum(replica.scheduler.num_preemptions for replica in engine.replicas),
        prompt_tokens=counters.prompt_tokens,
        cached_prompt_tokens=counters.cached_prompt_tokens,
        completion_tokens=counters.completion_tokens,
        num_blocks=sum(each.num_blocks for each in blocks),
        num_free_blocks=sum(each.num_free for each in blocks),
        block_size=blocks[0].block_size,
        uptime_s=uptime_s,
        looked_up_prompt_tokens=counters.looked_up_prompt_tokens,
        num_repeats=counters.num_repeats,
        active_s=engine.active_time.total_s,
        num_results=totals.num_results,
        result_payload_bytes=totals.result_payload_bytes,
        result_bytes=totals.result_bytes,
        num_frames=totals.frames.num_frames,
        num_fast_frames=totals.frames.num_fast_frames,
    )
    response.pipelines.extend(_pipeline_status(model, replica, totals) for replica in engine.replicas)
    response.spares.extend(_spare_status(shard) for shard in pipelines.registry.free)
    return response


def _pipeline_status(model: model_pb2.ModelDescription, replica: Replica, totals: PipelineTotals) -> pb.PipelineStatus:
    pipeline = replica.pipeline
    assert pipeline is not None, "a replica begins with an open pipeline"
    return pb.PipelineStatus(
        model=model,
        epoch=pipeline.epoch,
        ready=replica.ready,
        reason="" if replica.ready else replica.reason,
        stages=[_stage_status(stage, totals.stage(stage.address)) for stage in pipeline.stages],
        num_running=replica.scheduler.num_running,
        num_waiting=replica.scheduler.num_waiting,
    )


def _stage_status(stage: StageSession, totals: StageTotals) -> pb.StageStatus:
    facts = stage.shard.facts
    return pb.StageStatus(
        address=stage.address,
        layers=facts.layers,
        device=facts.device,
        dtype=facts.dtype,
        pid=facts.pid,
        hostname=facts.hostname,
        kernels=facts.kernels,
        weights_bytes=facts.weights_bytes,
        kv_cache_bytes=facts.kv_cache_bytes,
        queue_depth=stage.queue_depth,
        **totals.counters._asdict(),
    )


def _spare_status(shard: Shard) -> pb.SpareStatus:
    status = pb.SpareStatus(address=shard.address, assignable=shard.assignable, reason=shard.reason)
    if shard.description is not None:
        status.pid = shard.description.facts.pid
    if shard.layers is not None:
        status.layers.start, status.layers.end = shard.layers.start, shard.layers.end
    return status
