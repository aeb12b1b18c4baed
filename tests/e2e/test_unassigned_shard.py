"""A shard that is started without layers: it waits, takes those it is told, and stops when told to."""

import signal

import grpc
import pytest

from stagecoach import PROTOCOL_VERSION
from stagecoach.v1 import model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach.v1.shard_pb2_grpc import ShardStub
from tests.cluster import free_port
from tests.e2e.processes import run, run_each, running, shard_arguments

TIMEOUT_S = 60.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("assigned", [False, True], ids=["without layers", "with layers"])
def test_it_stops_with_status_0(tiny_model, number, assigned):
    port = free_port()
    with running("stagecoach-shard", *shard_arguments(tiny_model, "auto", port)) as shard:
        shard.wait_for("no layers yet")
        if assigned:
            # The generated stub: whoever speaks protobuf can assign.
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = ShardStub(channel)
                description = stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
                request = pb.AssignRequest(
                    protocol_version=PROTOCOL_VERSION,
                    model_fingerprint=description.model.fingerprint,
                    layers=model_pb2.LayerRange(start=1, end=4),
                )
                answer = stub.Assign(request, timeout=TIMEOUT_S).description
                assert (answer.layers.start, answer.layers.end) == (1, 4)
                assert answer.pid == shard.pid
            shard.wait_for("layers 1:4 loaded")
        assert shard.stop(number) == 0
    assert not [line for line in shard.lines if "Traceback" in line]


# Flags that cannot work, and what the refusal names.
HOPELESS = [
    ({"layers": "automatic"}, "or auto"),
    ({"model": "/nonexistent"}, "/nonexistent"),
    ({"device": "cuda:7"}, "cuda:7"),
    ({"kv-cache-memory": "plenty"}, "kv-cache-memory"),
    ({"kernels": "native", "dtype": "float32"}, "native is for bfloat16"),
]


def test_what_cannot_work_with_any_layers_is_said_at_the_start(tiny_model):
    runs = run_each(
        "stagecoach-shard", [shard_arguments(tiny_model, "auto", free_port(), **flags) for flags, _ in HOPELESS]
    )
    for (flags, message), ended in zip(HOPELESS, runs, strict=True):
        assert ended.returncode == 1, flags
        assert "stagecoach-shard: error: " in ended.stderr
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_help_says_that_layers_may_be_assigned():
    shown = run("stagecoach-shard", "--help")
    assert shown.returncode == 0
    assert "auto: those that a router assigns" in " ".join(shown.stdout.split())
