"""`stagecoach import` is its child's: what stops the one stops the other, and its status is the answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 60
# In the place of the importer: says that it works, and ends in its own time when it is told to.
IMPORTER = """
import signal, sys
def stop(number, frame):
    print("tidied up", flush=True)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
print("working", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_the_importer_which_tidies_up(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "stagecoach_gguf.py").write_text(IMPORTER)
    command = [sys.executable, "-c", "from stagecoach_cli import main; main()", "import", "a.gguf", "b"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        assert process.communicate(timeout=TIMEOUT_S)[0] == "tidied up\n"
        assert process.returncode == 128 + number
