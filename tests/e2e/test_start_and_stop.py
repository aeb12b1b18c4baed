"""Processes start, say what is wrong where something is, and stop when told to."""

import json
import os
import shutil
import signal
import socket
import sys
from contextlib import ExitStack

import pytest

from stagecoach_client import Client
from tests.cluster import free_port
from tests.e2e.processes import run, run_each, running, shard_arguments

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc, which is Linux's")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_shard_and_a_router_stop_with_status_0(tiny_model, number):
    shard_port, router_port = free_port(), free_port()
    with (
        running("stagecoach-shard", *shard_arguments(tiny_model, "0:4", shard_port)) as shard,
        running(
            "stagecoach-router", "--shards", f"127.0.0.1:{shard_port}", "--listen", f"127.0.0.1:{router_port}"
        ) as router,
    ):
        router.wait_for("ready")
        with Client(f"127.0.0.1:{router_port}") as client:
            assert client.generate("Hello", max_tokens=5, ignore_eos=True).usage.completion_tokens == 5
        assert router.stop(number) == 0
        assert shard.stop(number) == 0
    assert not [line for line in router.lines + shard.lines if "Traceback" in line]


def test_a_port_in_use_is_named(tiny_model):
    """Also where it is in use on one of the addresses that the name stands for, where callers would get to that one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for program, host, arguments in (
            ("stagecoach-shard", "127.0.0.1", shard_arguments(tiny_model, "0:4", port)),
            ("stagecoach-router", "localhost", ["--shards", "127.0.0.1:1", "--listen", f"localhost:{port}"]),
        ):
            ended = run(program, *arguments)
            assert ended.returncode == 1
            assert f"{program}: error: listen: cannot listen on {host}:{port}: 127.0.0.1: Address" in ended.stderr
            assert "Traceback" not in ended.stderr


def test_two_processes_of_ours_do_not_share_a_port(tiny_model):
    port = free_port()
    with running("stagecoach-shard", *shard_arguments(tiny_model, "0:4", port)) as shard:
        shard.wait_for("ready")
        assert "cannot listen" in run("stagecoach-shard", *shard_arguments(tiny_model, "0:4", port)).stderr


def edited_copy(model, folder, **changes):
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# What is changed in a checkpoint's config.json, and what the refusal names.
UNSERVABLE = [
    ({"model_type": "gpt_neox"}, "gpt_neox"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_hidden_layers": 3}, "layers"),
    ({"intermediate_size": 95}, "mlp"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}, "yarn"),
]
MISTYPED = [
    ({"layers": "0:9"}, "layers 0:9 were asked for"),
    ({"layers": "4:2"}, "layers 4:2 is empty"),
    ({"layers": "two"}, "START:END"),
    ({"kv-cache-memory": "1K"}, "kv-cache-memory"),
    ({"kv-cache-memory": "900T"}, "kv-cache-memory"),
    ({"device": "cuda:7"}, "cuda:7"),
    ({"model": "/nonexistent"}, "/nonexistent"),
    ({"dtype": "int3"}, "dtype"),
    ({"speed": "ludicrous"}, "--speed"),
]


def test_a_checkpoint_that_cannot_be_served_is_refused_at_start_with_the_fields_name(tiny_model, tmp_path):
    models = [
        edited_copy(tiny_model, tmp_path / str(number), **changes) for number, (changes, _) in enumerate(UNSERVABLE)
    ]
    runs = run_each("stagecoach-shard", [shard_arguments(model, "0:4", free_port()) for model in models])
    for (changes, message), ended in zip(UNSERVABLE, runs, strict=True):
        assert ended.returncode == 1, changes
        assert "stagecoach-shard: error: " in ended.stderr
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_mistyped_flag_is_named(tiny_model):
    runs = run_each(
        "stagecoach-shard", [shard_arguments(tiny_model, "0:4", free_port(), **flags) for flags, _ in MISTYPED]
    )
    for (flags, message), ended in zip(MISTYPED, runs, strict=True):
        assert ended.returncode in (1, 2), flags
        assert "error: " in ended.stderr
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("ranges", "models", "message"),
    [
        (["0:2", "3:4"], "aa", "no shard serves layers 2:3"),
        (["0:3", "2:4"], "aa", "layers 2:3 are served by more than one shard"),
        (["0:2", "2:4"], "ab", "model.fingerprint: "),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(tiny_model, other_model, ranges, models, message):
    folders = {"a": tiny_model, "b": other_model}
    with ExitStack() as stack:
        addresses = []
        for layers, name in zip(ranges, models, strict=True):
            port = free_port()
            stack.enter_context(running("stagecoach-shard", *shard_arguments(folders[name], layers, port)))
            addresses.append(f"127.0.0.1:{port}")
        ended = run("stagecoach-router", "--shards", ",".join(addresses), "--listen", f"127.0.0.1:{free_port()}")
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_shards_of_different_dtypes_are_refused(tiny_model):
    with ExitStack() as stack:
        addresses = []
        for layers, dtype in (("0:2", "float32"), ("2:4", "bfloat16")):
            port = free_port()
            stack.enter_context(running("stagecoach-shard", *shard_arguments(tiny_model, layers, port, dtype=dtype)))
            addresses.append(f"127.0.0.1:{port}")
        ended = run("stagecoach-router", "--shards", ",".join(addresses), "--listen", f"127.0.0.1:{free_port()}")
    assert ended.returncode == 1
    assert "dtype: " in ended.stderr


def test_up_serves_until_told_to_stop_and_its_children_stop_with_it(tiny_model):
    listen = f"127.0.0.1:{free_port()}"
    with running("stagecoach", "up", "--model", str(tiny_model), "--stages", "2", "--listen", listen) as up:
        up.wait_for("ready at")
        answer = run("stagecoach", "generate", "Hello", "--target", listen, "--max-tokens", "3", "--ignore-eos")
        assert answer.returncode == 0, answer.stderr
        status = run("stagecoach", "status", "--target", listen, "--json")
        stages = json.loads(status.stdout)["pipelines"][0]["stages"]
        assert [(stage["first_layer"], stage["end_layer"]) for stage in stages] == [(0, 2), (2, 4)]
        assert up.stop(signal.SIGINT) == 0
    for stage in stages:
        assert not _is_alive(stage["pid"])


@on_linux
def test_up_without_restarts_says_which_child_died_and_stops_the_rest(tiny_model):
    listen = f"127.0.0.1:{free_port()}"
    options = ["--stages", "2", "--no-restart", "--listen", listen]
    with running("stagecoach", "up", "--model", str(tiny_model), *options) as up:
        up.wait_for("ready at")
        with Client(listen) as client:
            stages = client.status().pipelines[0].stages
        os.kill(stages[1].pid, signal.SIGKILL)
        assert up.wait() == 1
        assert any("shard 2:4" in line and "SIGKILL" in line for line in up.lines)
    assert not any(_is_alive(stage.pid) for stage in stages)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
