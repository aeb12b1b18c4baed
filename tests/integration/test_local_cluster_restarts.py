"""A local cluster whose processes are killed: they come back, unless they cannot."""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

import pytest

from stagecoach.errors import Cancelled
from stagecoach_client import Client
from stagecoach_local import LocalCluster
from stagecoach_local.process_exit import ProcessDied
from stagecoach_local.restarts import MAX_FAILED_STARTS
from tests.integration.test_local_cluster_processes import SHARD, FakeCommands, gone

TIMEOUT_S = 30
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes by pidfd, which is Linux's")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 30}))
    return tmp_path


class Events(queue.Queue[str]):
    """What the cluster says has happened."""

    def next(self) -> str:
        return self.get(timeout=TIMEOUT_S)


@pytest.fixture
def events() -> Events:
    return Events()


class Loaded:
    """Hears of the shards that have loaded. The stand-in of a router is ready without them, and maybe before them."""

    def __init__(self) -> None:
        self._num_loaded = threading.Semaphore(0)

    def on_line(self, name: str, line: str) -> None:
        if line.startswith("loaded"):
            self._num_loaded.release()

    def wait_for(self, num_shards: int) -> None:
        for _ in range(num_shards):
            assert self._num_loaded.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def loaded() -> Loaded:
    return Loaded()


def kill(cluster: LocalCluster, index: int) -> int:
    pid = cluster.processes[index].pid
    os.kill(pid, signal.SIGKILL)
    return pid


def failing_after(marker: Path, last_words: str, status: int = 1) -> str:
    """A shard that starts once, and from then on ends at once."""
    return (
        f"import pathlib, sys; seen = pathlib.Path({str(marker)!r} + '-'.join(sys.argv[1:]).replace(':', '-'))\n"
        f"if seen.exists(): print({last_words!r}, file=sys.stderr), sys.exit({status})\n"
        "seen.touch()\n"
    ) + SHARD


def test_a_killed_shard_comes_back_with_its_command_and_address(model: Path, events: Events) -> None:
    lines: Events = Events()

    def hear(name: str, line: str) -> None:
        if name == "shard 15:30":
            lines.put(line)

    with LocalCluster(model, 2, restart=True, on_event=events.put, on_line=hear, commands=FakeCommands()) as cluster:
        before = cluster.processes
        assert lines.next() == f"loaded 15:30 {before[1].address}"
        pid = kill(cluster, 1)
        told = events.next()
        after = cluster.processes
        assert told == f"shard 15:30 (pid {pid}) was ended by SIGKILL; started again, pid {after[1].pid}"
        assert lines.next() == f"loaded 15:30 {before[1].address}"
        assert [process.pid == old.pid for process, old in zip(after, before, strict=True)] == [True, False, True]
        assert after[1].address == before[1].address
        cluster.check()
        with Client(cluster.address) as client:
            assert client.generate("x").text == "Hello, world"
    assert all(gone(process.pid) for process in cluster.processes)
    assert [ended.name for ended in cluster.exits] == ["shard 0:15", "shard 15:30", "router"]
    assert all(ended.clean for ended in cluster.exits)


def test_the_router_comes_back_at_its_address(model: Path, events: Events) -> None:
    with LocalCluster(model, 1, restart=True, on_event=events.put, commands=FakeCommands()) as cluster:
        address = cluster.address
        kill(cluster, 1)
        assert events.next().startswith("router (pid ")
        with Client(address, max_retries=20) as client:
            assert client.generate("x").text == "Hello, world"


def test_a_process_that_keeps_dying_before_it_came_up_is_given_more_and_more_time(model: Path, events: Events) -> None:
    with LocalCluster(model, 1, restart=True, on_event=events.put, commands=FakeCommands()) as cluster:
        for _ in range(2):
            kill(cluster, 0)
            assert "started again, pid" in events.next()
        kill(cluster, 0)
        assert events.next().endswith("to be started again in 0.5 s")
        assert events.next() == f"shard 0:30 started again, pid {cluster.processes[0].pid}"


def test_one_that_does_not_come_up_any_more_ends_the_wait(
    model: Path, tmp_path: Path, events: Events, loaded: Loaded
) -> None:
    commands = FakeCommands(shard=failing_after(tmp_path / "seen", "out of memory"))
    with LocalCluster(
        model, 1, restart=True, on_event=events.put, on_line=loaded.on_line, commands=commands
    ) as cluster:
        loaded.wait_for(1)
        kill(cluster, 0)
        with pytest.raises(ProcessDied, match=rf"(?s)shard 0:30.*{MAX_FAILED_STARTS} times in a row.*out of memory"):
            cluster.wait()
    assert all(gone(process.pid) for process in cluster.processes)


def test_a_shortage_that_passes_costs_no_shard(model: Path, tmp_path: Path, events: Events, loaded: Loaded) -> None:
    commands = FakeCommands(shard=failing_after(tmp_path / "seen", "stagecoach-shard: error: too little memory"))
    with LocalCluster(
        model, 1, restart=True, on_event=events.put, on_line=loaded.on_line, commands=commands
    ) as cluster:
        loaded.wait_for(1)
        kill(cluster, 0)
        told = events.next()
        while not told.endswith("to be started again in 0.5 s"):
            told = events.next()
        for marker in tmp_path.glob("seen*"):
            marker.unlink()
        loaded.wait_for(1)
        cluster.check()


def test_a_command_line_that_it_does_not_know_any_more_ends_the_wait_at_once(
    model: Path, tmp_path: Path, events: Events, loaded: Loaded
) -> None:
    commands = FakeCommands(shard=failing_after(tmp_path / "seen", "usage: it is gone", status=2))
    with LocalCluster(
        model, 1, restart=True, on_event=events.put, on_line=loaded.on_line, commands=commands
    ) as cluster:
        loaded.wait_for(1)
        kill(cluster, 0)
        with pytest.raises(ProcessDied, match=r"which a new start does not mend(?s:.*)it is gone"):
            cluster.wait()
    assert events.qsize() == 1


@pytest.mark.parametrize(("replicas", "spares"), [(2, 0), (1, 1)])
def test_one_that_cannot_be_kept_up_is_left_alone_as_long_as_the_others_can_serve(
    model: Path,
    tmp_path: Path,
    events: Events,
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    replicas: int,
    spares: int,
) -> None:
    monkeypatch.setenv("NUM_PIPELINES", str(replicas))
    commands = FakeCommands(shard=failing_after(tmp_path / "seen", "usage: it is broken", status=2))
    with LocalCluster(
        model,
        1,
        replicas=replicas,
        spares=spares,
        restart=True,
        on_event=events.put,
        on_line=loaded.on_line,
        commands=commands,
    ) as cluster:
        loaded.wait_for(replicas + spares)
        kill(cluster, 0)
        assert "started again" in events.next()
        told = events.next()
        assert told.startswith(cluster.processes[0].name)
        assert told.endswith("which a new start does not mend; the others serve on without it")
        cluster.check()
        with Client(cluster.address) as client:
            assert client.generate("x").text == "Hello, world"
        kill(cluster, 1)
        with pytest.raises(ProcessDied, match=r"which a new start does not mend(?s:.*)it is broken"):
            cluster.wait()
    assert all(gone(process.pid) for process in cluster.processes)


def test_one_that_the_system_cannot_start_just_now_is_tried_again(
    model: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    with LocalCluster(model, 1, restart=True, on_event=events.put, commands=FakeCommands()) as cluster:
        with monkeypatch.context() as patch:
            patch.setattr("stagecoach_local.child_process.subprocess.Popen", fail)
            kill(cluster, 0)
            told = events.next()
        assert told.startswith("cannot start shard 0:30: ")
        assert told.endswith("no more processes; to be started again in 0.5 s")
        while told.startswith("cannot start"):  # perhaps once more, before the system could again
            told = events.next()
        assert told == f"shard 0:30 started again, pid {cluster.processes[0].pid}"
        cluster.check()


def test_a_death_during_the_start_is_an_error_all_the_same(model: Path, events: Events) -> None:
    commands = FakeCommands(shard="import sys; sys.exit('out of memory')", router_options=["--not-ready"])
    with pytest.raises(ProcessDied, match="out of memory"):
        LocalCluster(model, 1, restart=True, on_event=events.put, commands=commands).start()
    assert events.empty()


def test_what_is_stopped_stays_stopped(model: Path, events: Events) -> None:
    """Stopped from another thread while a process waits for its next start."""
    cluster = LocalCluster(model, 1, restart=True, on_event=events.put, commands=FakeCommands())
    cluster.start()
    for _ in range(3):
        kill(cluster, 0)
        told = events.next()
    assert "to be started again" in told
    waiting = threading.Thread(target=cluster.wait)
    waiting.start()
    cluster.stop()
    waiting.join(TIMEOUT_S)
    assert not waiting.is_alive()
    assert all(gone(process.pid) for process in cluster.processes)
    assert [ended.status for ended in cluster.exits] == [-signal.SIGKILL, 0]
    assert events.empty()


def test_a_start_can_be_stopped(model: Path) -> None:
    waits = threading.Event()
    commands = FakeCommands(router_options=["--not-ready"])
    cluster = LocalCluster(model, 1, restart=True, on_wait=lambda _: waits.set(), commands=commands)
    failures: list[BaseException] = []

    def start() -> None:
        try:
            cluster.start()
        except Cancelled as error:
            failures.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    assert waits.wait(TIMEOUT_S)
    cluster.stop()
    starting.join(TIMEOUT_S)
    assert len(failures) == 1
    assert all(gone(process.pid) for process in cluster.processes)


def test_a_failure_of_the_watch_itself_is_heard_of(model: Path) -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError(text)

    with LocalCluster(model, 1, restart=True, on_event=fail, commands=FakeCommands()) as cluster:
        kill(cluster, 0)
        with pytest.raises(BrokenPipeError):
            cluster.wait()
    assert all(gone(process.pid) for process in cluster.processes)
