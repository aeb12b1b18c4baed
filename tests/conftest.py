"""What all tests share: the machine's threads, how many examples hypothesis tries, the order of files, models.

`make test` runs two processes of pytest side by side, and many tests start processes of their own. So everything that
computes keeps to one thread unless a test says otherwise: more threads than cores wait for each other in busy loops.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported, which reads it once; and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"

# How long an example takes is the machine's affair, and that of who else uses it. `ci` tries the same examples each
# time, so that it does not fail for what a change did not do; `nightly` looks for new ones.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=1000, derandomize=False, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The longest tests first: the many short ones then fill what is left of either core.
FOLDERS = ("e2e", "integration", "soak", "fuzz", "unit")


def pytest_configure() -> None:
    """Undoes what a shell does to a job in the background: its children would be deaf to Ctrl-C, and tests press it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by folder, and keeps the order within."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=place)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The imported SmolLM2-135M-Instruct checkpoint."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.fail(f"{SMOLLM2} is missing: run `make model`", pytrace=False)
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """The folder of the tiny model, and transformers' model of the same weights."""
    return _write_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def tiny_model(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    """A checkpoint of four layers that no weights have to be downloaded for."""
    return tiny[0]


@pytest.fixture(scope="session")
def reference(tiny: tuple[Path, LlamaForCausalLM]) -> LlamaForCausalLM:
    """What the tiny model is compared with."""
    return tiny[1]


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model's shape with other weights."""
    return _write_tiny_model(tmp_path_factory.mktemp("other"), seed=1)[0]


def _write_tiny_model(folder: Path, *, seed: int) -> tuple[Path, LlamaForCausalLM]:
    from tests.tiny_model import write_tiny_model  # here, as importing transformers takes seconds

    return folder, write_tiny_model(folder, seed=seed)
