"""Processes as a user would start them with certificates, and what they say without."""

import re
from contextlib import ExitStack

from stagecoach.security.tls import ROUTER_NAME, SHARD_NAME
from tests.cluster import free_port
from tests.e2e.processes import run, running

FLAGS = ["--dtype", "float32", "--kv-cache-memory", "4M"]


def test_without_tls_other_machines_are_not_let_in_unless_in_so_many_words():
    port = free_port()
    ended = run("stagecoach-router", "--shards", "127.0.0.1:1", "--listen", f"0.0.0.0:{port}")
    assert ended.returncode == 1
    assert f"stagecoach-router: error: listen: 0.0.0.0:{port} is open to other machines" in ended.stderr
    assert ended.stderr.count("\n") == 1
    arguments = ["--shards", "127.0.0.1:1", "--listen", f"0.0.0.0:{port}", "--insecure-listen"]
    with running("stagecoach-router", *arguments) as router:
        router.wait_for("listening on port")


def test_a_cluster_with_certificates_of_ours(tiny_model, tmp_path):
    made = run("stagecoach", "certs", str(tmp_path / "certs"), "--host", "router.example")
    assert made.returncode == 0, made.stderr
    assert "has certificates already" in run("stagecoach", "certs", str(tmp_path / "certs")).stderr
    ca = str(tmp_path / "certs" / "ca.pem")

    def identity(name):
        return ["--tls-cert", ca.replace("ca.pem", f"{name}.pem"), "--tls-key", ca.replace("ca.pem", f"{name}.key")]

    ports = [free_port() for _ in range(3)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        for layers, address in zip(("0:2", "2:4"), addresses, strict=False):
            arguments = ["--model", str(tiny_model), "--layers", layers, "--listen", address, *FLAGS]
            stack.enter_context(running("stagecoach-shard", *arguments, *identity(SHARD_NAME), "--tls-ca", ca))
        arguments = ["--shards", ",".join(addresses[:2]), "--listen", addresses[2]]
        router = running("stagecoach-router", *arguments, *identity(ROUTER_NAME), "--tls-ca", ca)
        stack.enter_context(router).wait_for("ready")
        ask = ["generate", "Hello", "--target", addresses[2], "--max-tokens", "3", "--ignore-eos"]
        answer = run("stagecoach", *ask, "--tls-ca", ca, "--tls-server-name", "router.example")
        assert answer.returncode == 0, answer.stderr
        refused = run("stagecoach", *ask)
        assert refused.returncode == 1
        assert "speaks TLS" in refused.stderr


def test_up_encrypts_what_other_machines_can_reach_and_says_how_to_call_it(tiny_model):
    listen = f"0.0.0.0:{free_port()}"
    with running("stagecoach", "up", "--model", str(tiny_model), "--stages", "2", "--listen", listen) as up:
        line = up.wait_for("stagecoach generate")
        found = re.search(r"--target (\S+) --tls-ca (\S+)", line)
        assert found, line
        target, ca = found.groups()
        ask = ["generate", "Hello", "--target", target, "--max-tokens", "3", "--ignore-eos"]
        assert "speaks TLS" in run("stagecoach", *ask).stderr
        answer = run("stagecoach", *ask, "--tls-ca", ca)
        assert answer.returncode == 0, answer.stderr


def test_up_without_tls_is_refused_where_other_machines_can_reach_it(tiny_model):
    listen = f"0.0.0.0:{free_port()}"
    ended = run("stagecoach", "up", "--model", str(tiny_model), "--stages", "1", "--no-tls", "--listen", listen)
    assert ended.returncode == 1
    assert "--insecure-listen" in ended.stderr
