"""How a model is split over local processes, which processes there are, and what they are started with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import CheckpointError, InvalidArgument, StagecoachError, TopologyError
from stagecoach.topology import LayerRange
from stagecoach_local import LocalCluster
from stagecoach_local.cluster_plan import plan_processes
from stagecoach_local.commands import StagecoachCommands
from stagecoach_local.layer_split import ModelShape, read_shape, split_layers
from stagecoach_local.process import Process


def test_stages_are_a_number_or_ranges() -> None:
    even = (LayerRange(0, 15), LayerRange(15, 30))
    assert (
        split_layers(2, ModelShape(30))
        == split_layers("2", ModelShape(30))
        == split_layers("15:30,0:15", ModelShape(30))
        == split_layers(even, ModelShape(30))
        == even
    )


@pytest.mark.parametrize("stages", [0, 31, "0", "two", "", "0:10,x"])
def test_stages_that_mean_nothing_are_refused(stages: int | str) -> None:
    with pytest.raises(InvalidArgument):
        split_layers(stages, ModelShape(30))


@pytest.mark.parametrize("stages", ["0:10,11:30", "0:10,9:30", "0:31", "0:29"])
def test_ranges_must_cover_the_model(stages: str) -> None:
    with pytest.raises(TopologyError):
        split_layers(stages, ModelShape(30))


@given(st.text(alphabet="0123456789:, -", max_size=12), st.integers(1, 40))
def test_any_text_gives_a_cover_or_a_typed_error(text: str, num_layers: int) -> None:
    try:
        ranges = split_layers(text, ModelShape(num_layers))
    except StagecoachError:
        return
    assert [layer for part in ranges for layer in range(part.start, part.end)] == list(range(num_layers))


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 30}, {"text_config": {"num_hidden_layers": 30}}, {"n_layer": 30}]
)
def test_the_number_of_layers_is_found(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path) == ModelShape(30)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "not json", '{"num_hidden_layers": "30"}', '{"num_hidden_layers": 0}', None]
)
def test_a_folder_without_it_is_not_a_checkpoint(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_shape(tmp_path)
    assert caught.value.field == "model"


def test_a_large_head_counts_as_layers_of_the_last_stage(tmp_path: Path) -> None:
    smollm2 = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(smollm2))
    shape = read_shape(tmp_path)
    assert shape == ModelShape(30, head_layers=4)
    assert split_layers(2, shape) == (LayerRange(0, 17), LayerRange(17, 30))


def test_commands_name_everything() -> None:
    commands = StagecoachCommands(Path("m"), device="cuda:0,cuda:1", kv_cache_memory="2G", threads_per_shard=3)
    shard = list(commands.shard(1, LayerRange(15, 30), "127.0.0.1:7"))
    assert shard[1:] == [
        "-m",
        "stagecoach_shard",
        "--model",
        "m",
        "--layers",
        "15:30",
        "--listen",
        "127.0.0.1:7",
        "--device",
        "cuda:1",
        "--dtype",
        "bfloat16",
        "--threads",
        "3",
        "--drain-timeout-s",
        "2",
        "--kv-cache-memory",
        "2G",
    ]
    router = list(commands.router(["a:1", "b:2"], "127.0.0.1:8"))
    assert router[1:] == [
        "-m",
        "stagecoach_router",
        "--shards",
        "a:1,b:2",
        "--listen",
        "127.0.0.1:8",
        "--drain-timeout-s",
        "2",
    ]


class Recorded:
    """What a cluster is asked to start, in the place of its commands."""

    def __init__(self) -> None:
        self.shards: list[tuple[int, LayerRange | None, str]] = []
        self.router_shards: list[str] = []

    def shard(self, index: int, layers: LayerRange | None, address: str) -> Sequence[str]:
        self.shards.append((index, layers, address))
        return ["shard"]

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        self.router_shards = list(shard_addresses)
        return ["router"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 30}))
    return tmp_path


HALVES = (LayerRange(0, 15), LayerRange(15, 30))


def plan(commands: Recorded, replicas: int, spares: int) -> list[Process]:
    """The processes of pipelines of two stages."""
    addresses = [f"127.0.0.1:{port}" for port in range(1, 2 * replicas + spares + 1)]
    return plan_processes(HALVES, replicas, spares, commands, addresses, "0.0.0.0:50050")


def test_replicas_are_whole_pipelines_and_spares_have_no_layers() -> None:
    commands = Recorded()
    processes = plan(commands, replicas=2, spares=2)
    assert [(process.name, process.role, process.layers) for process in processes] == [
        ("shard 0:15 #1", "shard", HALVES[0]),
        ("shard 15:30 #1", "shard", HALVES[1]),
        ("shard 0:15 #2", "shard", HALVES[0]),
        ("shard 15:30 #2", "shard", HALVES[1]),
        ("spare 1", "spare", None),
        ("spare 2", "spare", None),
        ("router", "router", None),
    ]
    assert [(index, layers) for index, layers, _ in commands.shards] == list(enumerate([*HALVES, *HALVES, None, None]))
    assert [process.address for process in processes[:-1]] == [address for *_, address in commands.shards]
    assert commands.router_shards == [f"127.0.0.1:{port}" for port in range(1, 7)]
    assert processes[-1].address == "127.0.0.1:50050"


def test_one_pipeline_needs_no_number() -> None:
    names = [process.name for process in plan(Recorded(), replicas=1, spares=1)]
    assert names == ["shard 0:15", "shard 15:30", "spare 1", "router"]


@pytest.mark.parametrize("counts", [{"replicas": 0}, {"spares": -1}])
def test_fewer_than_none_are_refused(model: Path, counts: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        LocalCluster(model, 1, **counts)
    assert caught.value.field in counts


def argument(command: Sequence[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_spares_share_the_memory_but_not_the_threads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    commands = LocalCluster(model, 2, replicas=2, spares=2)._commands
    shard, spare = commands.shard(0, LayerRange(0, 15), "127.0.0.1:1"), commands.shard(4, None, "127.0.0.1:2")
    assert argument(shard, "--layers") == "0:15"
    assert argument(spare, "--layers") == "auto"
    for command in (shard, spare):
        assert argument(command, "--threads") == "2"
        assert argument(command, "--kv-cache-fraction") == "0.0500"
