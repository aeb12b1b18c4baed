"""Fixtures that more than one kind of test uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SMOLLM2 = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"

# How long an example takes is the machine's affair, and that of who else uses it.
settings.register_profile("stagecoach", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stagecoach")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The imported SmolLM2-135M-Instruct checkpoint."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.fail(f"{SMOLLM2} is missing: run `make model`", pytrace=False)
    return SMOLLM2
