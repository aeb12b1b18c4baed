"""`stagecoach up` with its processes killed: streams go on, the processes come back, and the cluster is whole again."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from stagecoach_client import Client, Unavailable
from tests.cluster import free_port
from tests.e2e.processes import command, running

TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.1
NUM_TOKENS = 400
PROMPT = {"token_ids": [1, 2, 3, 4, 5], "max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a child dies with its parent on Linux only")


def wait_until_whole(client):
    """Both pipelines are ready, and a spare stands by."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        status = client.status()
        if status.num_ready == 2 and len(status.spares) == 1 and not status.spares[0].reason:
            return status
        assert time.monotonic() < deadline, f"{status.pipelines}\n{status.spares}"
        time.sleep(POLL_INTERVAL_S)


def test_killed_processes_cost_a_pause(tiny_model):
    listen = f"127.0.0.1:{free_port()}"
    options = ["--stages", "2", "--replicas", "2", "--spares", "1", "--dtype", "float32", "--kv-cache-memory", "4M"]
    with (
        running("stagecoach", "up", "--model", str(tiny_model), "--listen", listen, *options) as up,
        Client(listen, max_retries=20) as client,
    ):
        up.wait_for("ready at")
        undisturbed = client.generate(**PROMPT).completions
        wait_until_whole(client)
        stream = client.generate(**PROMPT, stream=True)
        next(stream)
        (serving,) = (pipeline for pipeline in client.status().pipelines if pipeline.num_running)
        pid = serving.stages[1].pid
        os.kill(pid, signal.SIGKILL)
        assert stream.collect().completions == undisturbed
        said = up.wait_for(f"(pid {pid}) was ended by SIGKILL; started again, pid ")
        assert said.startswith(("shard 2:4 #", "spare 1 "))
        wait_until_whole(client)

        router = up.wait_for("  router ").split("pid")[1].split()[0]
        os.kill(int(router), signal.SIGKILL)
        up.wait_for(f"router (pid {router}) was ended by SIGKILL; started again, pid ")
        assert client.generate(**PROMPT).completions == undisturbed
        pids = [stage.pid for pipeline in wait_until_whole(client).pipelines for stage in pipeline.stages]
        assert up.stop() == 0
    assert len(set(pids)) == 4
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("output", ["full disk", pytest.param("stopped reader", marks=pytest.mark.nightly)])
def test_an_output_that_takes_nothing_costs_lines_only(tiny_model, output):
    """And SIGHUP, which nohup has made ignored, ends nothing."""
    listen = f"127.0.0.1:{free_port()}"
    arguments = ["--model", str(tiny_model), "--listen", listen, "--dtype", "float32", "--stages", "1"]
    reading, writing = os.pipe()
    target = os.open("/dev/full", os.O_WRONLY) if output == "full disk" else writing
    if output == "stopped reader":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
    process = subprocess.Popen(
        command("stagecoach", "up", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=target,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None,
    )
    try:
        with Client(listen, max_retries=100) as client:
            answer = until_answered(client)
            pids = [stage.pid for pipeline in client.status().pipelines for stage in pipeline.stages]
            os.kill(pids[0], signal.SIGKILL)  # and what is said of it goes nowhere either
            process.send_signal(signal.SIGHUP)
            assert until_answered(client) == answer
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(writing)
        os.close(reading)


def until_answered(client):
    """The completions of PROMPT, as soon as there is a cluster to compute them."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return client.generate(**{**PROMPT, "max_tokens": 20}).completions
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(POLL_INTERVAL_S)
