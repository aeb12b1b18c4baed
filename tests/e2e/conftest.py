from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """The same shape, other weights."""
    folder = tmp_path_factory.mktemp("other")
    write_tiny_model(folder, seed=1)
    return folder
