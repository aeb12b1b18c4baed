"""The SDK installs with gRPC and protobuf alone, and the commands that need more say which extra has it."""

import re
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SDK = {"grpcio", "protobuf", "googleapis_common_protos"}


@pytest.mark.nightly  # it needs a package index; what test_client_imports.py checks needs none
@pytest.mark.timeout(300)
def test_the_bare_install_is_the_sdk_with_grpc_and_protobuf(tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(ROOT)], check=True, timeout=240)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    installed = {re.split("==| @ ", line)[0].lower().replace("-", "_") for line in listed.stdout.splitlines()}
    # typing_extensions is grpcio's.
    assert installed - {"pip", "setuptools"} == {*SDK, "stagecoach", "typing_extensions"}

    program = (
        "from stagecoach_client import AsyncClient, Client, Unavailable\n"
        "try:\n"
        "    Client('127.0.0.1:1', max_retries=0).generate('hello')\n"
        "except Unavailable:\n"
        "    print('refused')\n"
    )
    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "refused", ended.stderr

    for command, extra in {"stagecoach": "cli", "stagecoach-router": "router", "stagecoach-shard": "shard"}.items():
        ended = subprocess.run([python.parent / command], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        assert f"install Stagecoach with its [{extra}] extra\n" in ended.stderr
        assert ended.stderr.count("\n") == 1
