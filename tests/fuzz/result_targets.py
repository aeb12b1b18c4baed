"""What a router reads of its shards, and a client of its router: results, load reports, descriptions, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from stagecoach import errors
from stagecoach.errors.status import STATUS_METADATA_KEY, from_status, to_status
from stagecoach.rpc.framing import read_frame, write_frame
from stagecoach.sampling_params import SamplingParams
from stagecoach.topology import LayerRange, order_stages
from stagecoach.v1 import inference_pb2, model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_client.retry import Attempts
from stagecoach_router.engine.wire import OutputOrder, read_outputs
from stagecoach_router.metrics.counters import StageTotals
from stagecoach_router.metrics.load_report import StageCounters, read_load_report
from stagecoach_router.pipelines.pipeline import check_timings
from stagecoach_router.pipelines.shard_description import check_description
from stagecoach_router.sampling.outputs import WHOLE_ROW, InsufficientCandidates, OutputWant, Sampled
from stagecoach_router.sampling.sampler import choose_tokens
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.sequence import Sequence
from tests.fuzz.engine import Target
from tests.fuzz.service_targets import PROTOBUF_WORDS

VOCAB_SIZE = 200
NUM_STAGES = 2
_FLOATS = tuple(np.float32(value).tobytes() for value in (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -0.0))
_DOUBLES = tuple(np.float64(value).tobytes() for value in (math.nan, math.inf, -math.inf, 1.7e308, -1.0, 5e-324))

# The rows of one step, by what is asked for them: greedy; drawn from candidates, some with top-p, min-p, penalties and
# log-probabilities; drawn from whole rows.
_WANTS: tuple[tuple[OutputWant, tuple[SamplingParams, ...]], ...] = (
    (OutputWant(1, False, 1.0), (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0))),
    (
        OutputWant(16, True, 1.0),
        (
            *(SamplingParams(top_p=0.9) for _ in range(3)),
            SamplingParams(min_p=0.1),
            SamplingParams(),
            SamplingParams(frequency_penalty=1.0),
            SamplingParams(logprobs=3),
        ),
    ),
    (WHOLE_ROW, (SamplingParams(repetition_penalty=0.5), SamplingParams(logit_bias={3: 5.0}, logprobs=0))),
)


def _sequences(params: tuple[SamplingParams, ...]) -> list[Sequence]:
    return [
        Sequence(seq_id=index, prompt_tokens=(1, 2, 3), params=each, seed=index, output_tokens=[3])
        for index, each in enumerate(params)
    ]


def _valid_result() -> bytes:
    dice = np.random.default_rng(1)
    result = pb.StepResult(epoch=1, step=1, timings=[pb.StageTiming(compute_s=0.5) for _ in range(NUM_STAGES)])
    payload: list[bytes] = []
    for want, params in _WANTS:
        logits = -np.sort(-dice.normal(size=(len(params), VOCAB_SIZE)).astype("<f4"), axis=1)
        columns = want.num_candidates or VOCAB_SIZE
        result.outputs.add(
            num_rows=len(params),
            num_columns=columns,
            candidates=want.num_candidates > 0,
            log_sum_exp=want.log_sum_exp,
            dtype=model_pb2.DTYPE_FLOAT32,
        )
        if want.num_candidates:
            payload.append(np.tile(np.arange(columns, dtype="<i4"), (len(params), 1)).tobytes())
        payload.append(np.ascontiguousarray(logits[:, :columns]).tobytes())
        if want.log_sum_exp:
            payload += [np.log(np.exp(logits).sum(axis=1)).astype("<f4").tobytes()] * 2
    return write_frame(pb.SessionResponse(result=result), payload)


def step_result(scratch: Path) -> Target:
    """A result of the last stage, up to the chosen tokens: of the vocabulary, or the row's own error."""
    # The rows stand for what the scheduler would have: here only how many they are matters.
    rows: list[tuple[Any, ...]] = [tuple(range(len(params))) for _, params in _WANTS]
    order = OutputOrder(tuple((want, group) for (want, _), group in zip(_WANTS, rows, strict=True)))
    sequences = [_sequences(params) for _, params in _WANTS]

    def check(data: bytes) -> None:
        message, payload = read_frame(pb.SessionResponse, data)
        if message.WhichOneof("kind") == "fault":
            assert isinstance(from_status(message.fault.status), errors.StagecoachError | None)
        if message.WhichOneof("kind") != "result":
            raise errors.ShardFault("not a result")
        check_timings(message.result, NUM_STAGES)
        groups = read_outputs(message.result, payload, order, VOCAB_SIZE)
        with np.errstate(all="ignore"):
            for (_, outputs), group in zip(groups, sequences, strict=True):
                for choice in choose_tokens(outputs, group):
                    assert isinstance(choice, Sampled | InsufficientCandidates | errors.ShardFault)
                    if isinstance(choice, Sampled):
                        assert 0 <= choice.token_id < VOCAB_SIZE
                        assert choice.logprob is None or not math.isnan(choice.logprob)

    fault = pb.Fault(epoch=1, step=1, status=to_status(errors.ShardFault("broken", field="f", limit=1)))
    corpus = [_valid_result(), write_frame(pb.SessionResponse(fault=fault))]
    return Target("step_result", corpus, check, (*PROTOBUF_WORDS, *_FLOATS), share=8)


def load_report(scratch: Path) -> Target:
    """Load reports, one after the other: the totals only rise, and stay what a status can say."""
    corpus = [
        write_frame(
            pb.SessionResponse(
                load=pb.LoadReport(
                    num_steps=number,
                    num_tokens=9 * number,
                    compute_s=0.5 * number,
                    wait_s=1.5,
                    decode_s=0.1,
                    encode_s=0.1,
                    queue_s=0.2,
                    queue_depth=3,
                    num_frames=number,
                    num_fast_frames=number,
                )
            )
        )
        for number in (1, 2, 2**40)
    ]
    totals = StageTotals()
    totals.add("a", StageCounters())

    def check(data: bytes) -> None:
        message, _ = read_frame(pb.SessionResponse, data)
        if message.WhichOneof("kind") != "load":
            raise errors.ShardFault("not a load report")
        before = totals.counters
        report = read_load_report(message.load)
        totals.add("a", report.counters)
        assert all(now >= then for now, then in zip(totals.counters, before, strict=True)), (before, totals.counters)
        inference_pb2.StageStatus(queue_depth=report.queue_depth, **totals.counters._asdict())

    return Target("load_report", corpus, check, (*PROTOBUF_WORDS, *_DOUBLES), share=15)


def description(scratch: Path) -> Target:
    """What a shard says it is, up to what the router makes of it."""
    valid = pb.DescribeResponse(
        protocol_version=1,
        shard_id="s",
        model=model_pb2.ModelDescription(
            name="m",
            family="llama",
            fingerprint="f",
            num_layers=4,
            hidden_size=48,
            vocab_size=260,
            context_length=512,
        ),
        layers=model_pb2.LayerRange(start=0, end=4),
        dtype=model_pb2.DTYPE_FLOAT32,
        block_size=16,
        num_blocks=64,
        max_batch_tokens=64,
    )

    def check(data: bytes) -> None:
        try:
            message = pb.DescribeResponse.FromString(data)
        except DecodeError as error:
            raise errors.InvalidArgument(str(error)) from error
        check_description("h:1", message)
        if message.layers.end:
            order_stages([LayerRange(message.layers.start, message.layers.end)], message.model.num_layers)
        assert -(-message.model.context_length // message.block_size) >= 1
        BlockManager(max(1, message.num_free_blocks), message.block_size)
        model_pb2.DType.Name(message.dtype)

    return Target("description", [valid.SerializeToString()], check, PROTOBUF_WORDS, share=15)


class _FailedCall(grpc.RpcError):
    """A call that ended with this in its trailing metadata."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "it broke"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((STATUS_METADATA_KEY, self._data),)


def error_status(scratch: Path) -> Target:
    """A server's error: whatever it says, the client gets one of ours, waits no longer than it wants to, goes on."""
    known = [
        errors.KVCacheFull.of_blocks(needed=9, free=4),
        errors.Overloaded("full", retry_after_s=2.5),
        errors.InvalidArgument("no", field="top_p", limit="(0, 1]", value="\U0001f600" * 90),
    ]
    corpus = [to_status(error).SerializeToString() for error in known]

    def check(data: bytes) -> None:
        error = errors.from_rpc_error(_FailedCall(data), "h:1")
        assert isinstance(error, errors.StagecoachError)
        delay_s = Attempts(60.0, 3, clock=lambda: 0.0, dice=lambda: 0.5).delay_s(error)
        assert delay_s is None or 0.0 <= delay_s < 60.0
        # What a proxy of ours would pass on fits the metadata of a call.
        assert to_status(error).ByteSize() < 2048
        if errors.from_trailing_metadata([(STATUS_METADATA_KEY, data)]) is None:
            raise error

    return Target("error_status", corpus, check, (*PROTOBUF_WORDS, *_DOUBLES), share=20)
