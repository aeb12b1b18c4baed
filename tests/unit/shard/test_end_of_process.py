"""The process ends with the status that it was given, also in the middle of a step."""

from __future__ import annotations

import subprocess
import sys

# As the compute thread is in the midst of a step: in torch, without Python's lock most of the time.
_COMPUTES = """
import threading, torch
from stagecoach_shard.__main__ import end

begun = threading.Event()

def compute():
    x = torch.rand(600, 600)
    while True:
        x = torch.linalg.qr(x @ x).Q
        begun.set()

threading.Thread(target=compute, name="compute", daemon=True).start()
begun.wait()
end(3)
"""


def test_a_step_that_is_under_way_changes_no_status() -> None:
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", _COMPUTES], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (3, "")
