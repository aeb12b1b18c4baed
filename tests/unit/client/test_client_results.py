"""Responses of the server become chunks, whole answers and statuses; broken ones become errors."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InternalError
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_client.results import Chunk, GenerationBuilder, PositionLogprobs, TokenLogprob, Usage, read_chunk
from stagecoach_client.status import SpareStatus, read_status


def delta(index: int = 0, text: str = "", finish: int = 0, tokens: list[int] | None = None) -> pb.GenerateResponse:
    return pb.GenerateResponse(request_id="r", index=index, text=text, token_ids=tokens or [], finish_reason=finish)


@given(
    st.lists(
        st.lists(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3)), min_size=1),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_deltas_in_any_interleaving_make_the_whole(deltas: list[list[tuple[str, list[int]]]], dice: object) -> None:
    builder = GenerationBuilder(len(deltas))
    left = [list(own) for own in deltas]
    while any(left):
        index = dice.choice([i for i, own in enumerate(left) if own])  # type: ignore[attr-defined]
        text, tokens = left[index].pop(0)
        builder.add(delta(index, text, 0 if left[index] else pb.FINISH_REASON_STOP, tokens))
    completions = builder.build().completions
    assert [c.text for c in completions] == ["".join(text for text, _ in own) for own in deltas]
    assert [list(c.token_ids) for c in completions] == [[t for _, ids in own for t in ids] for own in deltas]


def test_a_chunk_holds_everything_of_its_response() -> None:
    response = pb.GenerateResponse(
        index=2,
        text="hé",
        token_ids=[4],
        logprobs=[
            pb.PositionLogprobs(
                chosen=pb.TokenLogprob(token_id=4, text="hé", logprob=-0.5),
                top=[pb.TokenLogprob(token_id=9, text="x", logprob=-0.25)],
            )
        ],
        finish_reason=pb.FINISH_REASON_LENGTH,
        usage=pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=1),
    )
    assert read_chunk(response) == Chunk(
        index=2,
        text="hé",
        token_ids=(4,),
        logprobs=(PositionLogprobs(TokenLogprob(4, "hé", -0.5), (TokenLogprob(9, "x", -0.25),)),),
        finish_reason="length",
        usage=Usage(3, 2, 1),
    )


@pytest.mark.parametrize(("number", "expected"), [(0, None), (1, "stop"), (2, "length"), (77, "other")])
def test_finish_reasons(number: int, expected: str | None) -> None:
    assert read_chunk(delta(finish=number)).finish_reason == expected


def test_usage_counts_the_prompt_once_and_all_completions() -> None:
    builder = GenerationBuilder(2)
    for index, cached in ((0, 0), (1, 16)):
        response = delta(index, "x", pb.FINISH_REASON_STOP)
        response.usage.CopyFrom(pb.Usage(prompt_tokens=20, cached_tokens=cached, completion_tokens=7))
        builder.add(response)
    assert builder.build().usage == Usage(prompt_tokens=20, cached_tokens=0, completion_tokens=14)


@pytest.mark.parametrize(
    "responses",
    [
        [delta(1)],
        [delta(0, finish=1), delta(0)],
        [delta(0)],
        [],
    ],
    ids=["unasked completion", "after the end", "no end", "nothing"],
)
def test_a_server_that_breaks_the_contract_is_an_error(responses: list[pb.GenerateResponse]) -> None:
    def read() -> None:
        builder = GenerationBuilder(1)
        for response in responses:
            builder.add(response)
        builder.build()

    with pytest.raises(InternalError):
        read()


def test_status_of_a_cluster_that_has_nothing_yet() -> None:
    status = read_status(pb.GetClusterStatusResponse(pipelines=[pb.PipelineStatus(reason="starting")]))
    assert not status.ready
    assert status.pipelines[0].reason == "starting"
    assert read_status(pb.GetClusterStatusResponse()).pipelines == ()


def test_status_of_several_pipelines_and_spares() -> None:
    response = pb.GetClusterStatusResponse(
        pipelines=[pb.PipelineStatus(reason="lost", num_waiting=2), pb.PipelineStatus(ready=True, num_running=3)],
        spares=[
            pb.SpareStatus(address="a:1", assignable=True, pid=7),
            pb.SpareStatus(address="a:2", layers=model_pb2.LayerRange(start=4, end=9), reason="other dtype"),
        ],
    )
    status = read_status(response)
    assert status.ready
    assert status.num_ready == 1
    assert [(each.num_running, each.num_waiting) for each in status.pipelines] == [(0, 2), (3, 0)]
    assert status.spares == (SpareStatus("a:1", 0, 0, True, "", pid=7), SpareStatus("a:2", 4, 9, False, "other dtype"))
    assert [spare.has_layers for spare in status.spares] == [False, True]


def test_an_unknown_dtype_does_not_break_the_status() -> None:
    response = pb.GetClusterStatusResponse(pipelines=[pb.PipelineStatus(stages=[pb.StageStatus(dtype=99)])])
    assert read_status(response).pipelines[0].stages[0].dtype == "unknown"


def test_a_stage_is_busy_for_the_part_of_its_time_in_which_it_computed() -> None:
    stages = [pb.StageStatus(compute_s=3.0, wait_s=1.0), pb.StageStatus()]
    status = read_status(pb.GetClusterStatusResponse(pipelines=[pb.PipelineStatus(stages=stages)]))
    assert [stage.busy_fraction for stage in status.pipelines[0].stages] == [0.75, None]


def numbered(message: Message) -> dict[str, int | str]:
    """Gives each number and text of the message a value of its own, and returns the values by name."""
    values: dict[str, int | str] = {}
    for number, field in enumerate(message.DESCRIPTOR.fields, start=1):
        if field.message_type is None and field.enum_type is None and field.type != field.TYPE_BOOL:
            values[field.name] = f"text {number}" if field.type == field.TYPE_STRING else number
            setattr(message, field.name, values[field.name])
    return values


def test_every_figure_of_a_status_is_read_into_the_field_of_its_name() -> None:
    response = pb.GetClusterStatusResponse()
    of_router = numbered(response)
    of_pipeline = numbered(response.pipelines.add())
    of_stage = numbered(response.pipelines[0].stages.add())
    of_model = numbered(response.pipelines[0].model)
    status = read_status(response)
    pipeline = status.pipelines[0]
    for read, sent in (
        (status, of_router),
        (pipeline, of_pipeline),
        (pipeline.stages[0], of_stage),
        (pipeline.model, of_model),
    ):
        assert {name: getattr(read, name) for name in sent} == sent
