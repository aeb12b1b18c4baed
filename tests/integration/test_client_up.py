"""A cluster of stand-ins: real processes, a real gRPC router, no model."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stagecoach.errors import ConfigError, DeadlineExceeded
from stagecoach.topology import LayerRange
from stagecoach_client import Client
from stagecoach_client.child_process import ProcessDied
from stagecoach_client.local_cluster import LocalCluster, free_addresses

ROOT = Path(__file__).parents[2]
SHARD = """
import signal, sys, time
print("loaded", *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
time.sleep(100)
"""
ROUTER = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.integration.fake_router import FakeRouter, serving
router = FakeRouter()
router.ready = "--not-ready" not in sys.argv
with serving(router, sys.argv[sys.argv.index("--listen") + 1]):
    print("serving", flush=True)
    signal.sigwait([signal.SIGTERM])
"""


class FakeCommands:
    def __init__(self, shard: str = SHARD, router_options: Sequence[str] = ()) -> None:
        self._shard = shard
        self._router_options = router_options

    def shard(self, stage: int, layers: LayerRange, address: str) -> Sequence[str]:
        return [sys.executable, "-c", self._shard, str(layers), address]

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        return [sys.executable, "-c", ROUTER, "--listen", address, *self._router_options]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 30}))
    return tmp_path


def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds, whoever's child it is."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watch], [], [], 10)[0])
    finally:
        os.close(watch)


def test_a_cluster_comes_up_answers_and_goes_away(model: Path) -> None:
    lines: list[tuple[str, str]] = []
    with LocalCluster(model, 2, on_line=lambda *line: lines.append(line), commands=FakeCommands()) as cluster:
        with Client(cluster.address) as client:
            assert client.generate("x").text == "Hello, world"
        names = [process.name for process in cluster.processes]
        assert names == ["shard 0:15", "shard 15:30", "router"]
        assert [process.layers for process in cluster.processes] == [LayerRange(0, 15), LayerRange(15, 30), None]
        assert len({process.address for process in cluster.processes}) == 3
        cluster.check()
        pids = [process.pid for process in cluster.processes]
    assert all(gone(pid) for pid in pids)
    assert ("shard 15:30", f"loaded 15:30 {cluster.processes[1].address}") in lines
    assert ("shard 0:15", "told to stop") in lines
    assert ("router", "serving") in lines


def test_a_process_that_dies_while_starting_is_named_with_its_words(model: Path) -> None:
    commands = FakeCommands(shard="import sys; sys.exit('out of memory' if sys.argv[1] == '15:30' else 0)")
    cluster = LocalCluster(model, "0:15,15:30", commands=commands)
    with pytest.raises(ProcessDied, match="shard"):
        cluster.start()
    assert all(gone(process.pid) for process in cluster.processes)


def test_a_process_that_dies_later_ends_the_wait(model: Path) -> None:
    with LocalCluster(model, 2, commands=FakeCommands()) as cluster:
        os.kill(cluster.processes[1].pid, signal.SIGKILL)
        with pytest.raises(ProcessDied, match=r"(?s)shard 15:30.*SIGKILL.*loaded 15:30"):
            cluster.wait()


def test_a_cluster_that_never_gets_ready_says_what_it_waited_for(model: Path) -> None:
    reasons: list[str] = []
    commands = FakeCommands(router_options=["--not-ready"])
    cluster = LocalCluster(model, 1, start_timeout_s=1.5, on_wait=reasons.append, commands=commands)
    with pytest.raises(DeadlineExceeded, match="layers 10:20 are missing"):
        cluster.start()
    assert reasons[-1] == "layers 10:20 are missing"
    assert all(gone(process.pid) for process in cluster.processes)


def test_a_process_that_will_not_stop_is_killed(model: Path) -> None:
    deaf = SHARD.replace('lambda *_: sys.exit("told to stop")', "signal.SIG_IGN")
    cluster = LocalCluster(model, 1, stop_timeout_s=0.3, commands=FakeCommands(shard=deaf))
    cluster.start()
    began = time.monotonic()
    cluster.stop()
    assert time.monotonic() - began < 5
    assert all(gone(process.pid) for process in cluster.processes)


def test_a_port_in_use_is_an_error_before_anything_starts(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = LocalCluster(model, 1, listen=f"127.0.0.1:{taken.getsockname()[1]}", commands=FakeCommands())
        with pytest.raises(ConfigError, match="in use"):
            cluster.start()
    assert cluster.processes == ()


def test_a_listener_on_all_interfaces_is_called_on_loopback(model: Path) -> None:
    with LocalCluster(model, 1, listen="0.0.0.0:0", commands=FakeCommands()) as cluster:
        assert cluster.address.startswith("127.0.0.1:")


def test_free_addresses_differ() -> None:
    addresses = free_addresses(["127.0.0.1:0"] * 20)
    assert len(set(addresses)) == 20


@pytest.fixture
def up(model: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`stagecoach up`, with stand-ins in the place of the packages that it starts."""
    for package, code in (("stagecoach_shard", SHARD), ("stagecoach_router", ROUTER)):
        folder = tmp_path / "stand_ins" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "__main__.py").write_text(code)
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from stagecoach_client.cli import main; main()"),
            *("up", "--model", str(model), "--stages", "2", "--listen", "127.0.0.1:0", "--dtype", "float32"),
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "stand_ins"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"ended after {seen}"
        seen += line
    return seen


def pids(shown: str) -> list[int]:
    return [int(line.split("pid")[1].split()[0]) for line in shown.splitlines() if " pid " in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_shows_the_cluster_and_stops_it(up: subprocess.Popen[str], number: signal.Signals) -> None:
    shown = read_until(up, "ctrl-C")
    assert "[shard 0:15] loaded" in shown
    assert "--layers 15:30" in shown
    assert "--dtype float32" in shown
    children = pids(shown)
    assert len(children) == 3
    up.send_signal(number)
    _, errors = up.communicate(timeout=30)
    assert (up.returncode, errors) == (0, "")
    assert all(gone(pid) for pid in children)


def test_up_says_which_process_died_and_stops_the_rest(up: subprocess.Popen[str]) -> None:
    children = pids(read_until(up, "ctrl-C"))
    os.kill(children[0], signal.SIGKILL)
    _, errors = up.communicate(timeout=30)
    assert up.returncode == 1
    assert errors.startswith("error: shard 0:15 (pid ")
    assert "SIGKILL" in errors
    assert all(gone(pid) for pid in children)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's watch is Linux's")
def test_nothing_outlives_an_up_that_was_killed(up: subprocess.Popen[str]) -> None:
    children = pids(read_until(up, "ctrl-C"))
    up.kill()
    assert all(gone(pid) for pid in children)
