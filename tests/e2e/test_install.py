"""The SDK installs with grpcio and protobuf alone."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_bare_install_is_the_sdk_with_grpcio_and_protobuf(tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(ROOT)], check=True, timeout=240)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    installed = {line.split("==")[0].lower() for line in listed.stdout.splitlines()}
    assert (
        installed - {"pip", "setuptools"}
        == {"stagecoach", "grpcio", "protobuf", "typing_extensions", "typing-extensions"} & installed
    )
    assert {"stagecoach", "grpcio", "protobuf"} <= installed

    program = (
        "from stagecoach_client import AsyncClient, Client, Unavailable\n"
        "try:\n"
        "    Client('127.0.0.1:1', max_retries=0).generate('hello')\n"
        "except Unavailable:\n"
        "    print('refused')\n"
    )
    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "refused", ended.stderr

    command = subprocess.run([python.parent / "stagecoach", "status"], capture_output=True, text=True, timeout=60)
    assert command.returncode == 1
    assert "pip install 'stagecoach[cli]'" in command.stderr
    assert sys.executable != str(python)
