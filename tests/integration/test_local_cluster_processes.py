"""A cluster of stand-ins: real processes, a real gRPC router, no model."""

from __future__ import annotations

import contextlib
import io
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
from typing import Any

import pytest
from rich.console import Console

from stagecoach.errors import ConfigError, DeadlineExceeded
from stagecoach.topology import LayerRange
from stagecoach_cli.demo import run_demo
from stagecoach_client import Client
from stagecoach_local.addresses import free_addresses
from stagecoach_local.local_cluster import NUM_START_ATTEMPTS, LocalCluster
from stagecoach_local.process_exit import ProcessDied, ProcessExit

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes by pidfd, which is Linux's")

SHARD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("told to stop")))
print("loaded", *sys.argv[1:], flush=True)
time.sleep(100)
"""
ROUTER = f"""
import os, pathlib, signal, sys, time
if "--after" in sys.argv:  # so many lines are in the file: the shard, which is no part of this router, has come up
    file, count = pathlib.Path(sys.argv[sys.argv.index("--after") + 1]), int(sys.argv[sys.argv.index("--after") + 2])
    while not file.exists() or len(file.read_text().split()) < count:
        time.sleep(0.02)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
sys.path.insert(0, {str(ROOT)!r})
from tests.integration.fake_router import FakeRouter, saying, serving
router = FakeRouter()
router.ready = "--not-ready" not in sys.argv
router.num_pipelines = int(os.environ.get("NUM_PIPELINES", "1"))
if "--says" in sys.argv:
    router.answer = saying(sys.argv[sys.argv.index("--says") + 1])
with serving(router, sys.argv[sys.argv.index("--listen") + 1]):
    print("serving", flush=True)
    signal.sigwait([signal.SIGTERM])
"""


class FakeCommands:
    def __init__(self, shard: str = SHARD, router_options: Sequence[str] = ()) -> None:
        self._shard = shard
        self._router_options = router_options

    def shard(self, index: int, layers: LayerRange | None, address: str) -> Sequence[str]:
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
    shard = "import sys; sys.exit('out of memory' if sys.argv[1] == '15:30' else 0)"
    commands = FakeCommands(shard=shard, router_options=["--not-ready"])
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
    now_s = 0.0

    def hear(reason: str) -> None:  # time stands still until the router, on however busy a machine, says why
        nonlocal now_s
        now_s += 100.0 if reason == "layers 10:20 are missing" else 0.0

    commands = FakeCommands(router_options=["--not-ready"])
    cluster = LocalCluster(model, 1, start_timeout_s=99.0, on_wait=hear, clock=lambda: now_s, commands=commands)
    with pytest.raises(DeadlineExceeded, match="after 99 s: layers 10:20 are missing"):
        cluster.start()
    assert all(gone(process.pid) for process in cluster.processes)


def test_a_process_that_will_not_stop_is_killed(model: Path) -> None:
    deaf = SHARD.replace('lambda *_: sys.exit(print("told to stop"))', "signal.SIG_IGN")
    cluster = LocalCluster(model, 1, stop_timeout_s=1.0, commands=FakeCommands(shard=deaf))
    cluster.start()
    began = time.monotonic()
    cluster.stop()
    assert time.monotonic() - began < 30  # the shard would take 100
    assert all(gone(process.pid) for process in cluster.processes)
    (shard, _) = cluster.exits
    assert (shard.name, shard.status, shard.killed, shard.clean) == ("shard 0:30", -signal.SIGKILL, True, False)


def test_how_each_process_ended_is_kept(model: Path) -> None:
    failing = SHARD.replace('print("told to stop")', "7")
    with LocalCluster(model, 1, commands=FakeCommands(shard=failing)) as cluster:
        assert cluster.exits == ()
    assert cluster.exits == (ProcessExit("shard 0:30", 7, killed=False), ProcessExit("router", 0, killed=False))
    cluster.stop()
    assert len(cluster.exits) == 2


def test_a_cluster_has_no_address_before_its_start(model: Path) -> None:
    with pytest.raises(RuntimeError, match="has not been started"):
        _ = LocalCluster(model, 1, commands=FakeCommands()).address


def losing_its_port(marker: Path, times: int) -> str:
    """A shard that finds its port taken, the first `times` times."""
    return (
        f"import pathlib, sys; log = pathlib.Path({str(marker)!r}); log.open('a').write(sys.argv[2] + chr(10))\n"
        f"if len(log.read_text().split()) <= {times}: sys.exit('error: listen: cannot listen on ' + sys.argv[2])\n"
    ) + SHARD


def test_a_port_that_somebody_else_took_is_replaced(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = FakeCommands(shard=losing_its_port(log, 1), router_options=["--after", str(log), "2"])
    with LocalCluster(model, 1, commands=commands) as cluster:
        first, second = log.read_text().split()
        assert first != second == cluster.processes[0].address
        assert len(cluster.processes) == 2
        cluster.check()
    assert all(ended.clean for ended in cluster.exits)


def test_ports_that_are_always_taken_end_the_start(model: Path, tmp_path: Path) -> None:
    commands = FakeCommands(shard=losing_its_port(tmp_path / "log", 99), router_options=["--not-ready"])
    cluster = LocalCluster(model, 1, commands=commands)
    with pytest.raises(ProcessDied, match="cannot listen on"):
        cluster.start()
    assert len((tmp_path / "log").read_text().split()) == NUM_START_ATTEMPTS
    assert all(gone(process.pid) for process in cluster.processes)


class Demo:
    """`run_demo` on a cluster of stand-ins."""

    def __init__(self, model: Path, **commands: Any) -> None:
        self._output = io.StringIO()
        console = Console(file=self._output, width=160)
        cluster = LocalCluster(model, 1, stop_timeout_s=1.0, commands=FakeCommands(**commands))
        self.faults = run_demo(cluster, console, console.status("starting"))

    @property
    def shown(self) -> str:
        return self._output.getvalue()


def test_a_demo_shows_answers_and_processes_and_has_no_faults(model: Path) -> None:
    demo = Demo(model, router_options=["--says", "It is Paris."])
    assert demo.faults == []
    for index in range(4):
        assert f"[{index}] It is Paris.\n" in demo.shown
    assert "shard 0:30" in demo.shown
    assert "all 2 processes stopped when told to, with status 0" in demo.shown


def test_a_demo_with_a_wrong_answer_has_a_fault(model: Path) -> None:
    (fault,) = Demo(model).faults
    assert "does not say Paris: 'Hello, world'" in fault


def test_a_demo_whose_process_does_not_stop_has_a_fault(model: Path) -> None:
    deaf = SHARD.replace('lambda *_: sys.exit(print("told to stop"))', "signal.SIG_IGN")
    demo = Demo(model, shard=deaf, router_options=["--says", "It is Paris."])
    assert demo.faults == ["shard 0:30 did not stop in time and was killed"]
    assert "stopped when told to" not in demo.shown


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


COMMAND = (sys.executable, "-c", "from stagecoach_cli import main; main()")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For a command: stand-ins in the place of the packages that it starts."""
    for package, code in (("stagecoach_shard", SHARD), ("stagecoach_router", ROUTER)):
        folder = tmp_path / "stand_ins" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "__main__.py").write_text(code)
    path = [str(tmp_path / "stand_ins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running_up(model: Path, environment: dict[str, str], *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "up", "--model", str(model), "--listen", "127.0.0.1:0", "--dtype", "float32", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def up(model: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with running_up(model, environment) as process:
        yield process


def test_the_demo_command_ends_with_1_and_says_why(model: Path, environment: dict[str, str]) -> None:
    ended = subprocess.run(
        [*COMMAND, "demo", "--model", str(model)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the answer to 'What is the capital of France?' does not say Paris")
    assert ended.stderr.count("\n") == 1
    assert "[3] Hello, world\n" in ended.stdout


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


def test_up_without_restarts_says_which_process_died_and_stops_the_rest(
    model: Path, environment: dict[str, str]
) -> None:
    with running_up(model, environment, "--no-restart") as up:
        children = pids(read_until(up, "ctrl-C"))
        os.kill(children[0], signal.SIGKILL)
        _, errors = up.communicate(timeout=30)
        assert up.returncode == 1
        assert errors.startswith("error: shard 0:15 (pid ")
        assert "SIGKILL" in errors
        assert all(gone(pid) for pid in children)


def test_up_starts_a_process_again_that_was_killed_and_says_so(up: subprocess.Popen[str]) -> None:
    children = pids(read_until(up, "ctrl-C"))
    os.kill(children[0], signal.SIGKILL)
    said = read_until(up, "started again").splitlines()[-1]
    assert said.startswith(f"shard 0:15 (pid {children[0]}) was ended by SIGKILL; started again, pid ")
    read_until(up, "[shard 0:15] loaded")
    up.terminate()
    _, errors = up.communicate(timeout=30)
    assert (up.returncode, errors) == (0, "")
    assert gone(int(said.split()[-1]))


def test_up_names_replicas_and_spares_apart(model: Path, environment: dict[str, str]) -> None:
    options = ["--stages", "1", "--replicas", "2", "--spares", "1"]
    with running_up(model, {**environment, "NUM_PIPELINES": "2"}, *options) as up:
        shown = read_until(up, "ctrl-C")
        up.terminate()
    for name in ("shard 0:30 #1", "shard 0:30 #2", "spare 1", "router"):
        assert f"  {name} " in shown
    assert "--layers auto" in shown


def test_nothing_outlives_an_up_that_was_killed(up: subprocess.Popen[str]) -> None:
    children = pids(read_until(up, "ctrl-C"))
    up.kill()
    assert all(gone(pid) for pid in children)
