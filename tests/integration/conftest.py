"""A tiny checkpoint and its reference model, made once."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """The folder of the tiny model, and transformers' model of the same weights."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny_model(folder)


@pytest.fixture(scope="session")
def tiny_model(tiny) -> Path:
    return tiny[0]


@pytest.fixture(scope="session")
def reference(tiny) -> LlamaForCausalLM:
    return tiny[1]


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """A model of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("other")
    write_tiny_model(folder, seed=1)
    return folder
