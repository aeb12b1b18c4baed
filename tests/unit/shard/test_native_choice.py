"""When layers run on the CPU kernels, and what is said when they cannot."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from stagecoach.errors import ConfigError
from stagecoach.topology import LayerRange
from stagecoach_shard.attention.sdpa import SdpaAttention
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.native import library
from stagecoach_shard.native.layers import MAX_HEAD_DIM, Kernels, native_library
from stagecoach_shard.runtime.stage import Stage
from tests.unit.shard.native_layers import CPU, compiler, family
from tests.unit.shard.tiny_models import save_tiny_model

SLOWLY = "the layers run on torch"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without one, and a process that has not loaded the library yet."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Four layers, tied, with heads of 64."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, {"model_type": "llama", "head_dim": 64, "tie_word_embeddings": True})
    return open_checkpoint(folder)


def load(checkpoint: Checkpoint, kernels: Kernels, dtype: torch.dtype = torch.bfloat16) -> Stage:
    return Stage.load(checkpoint, LayerRange(0, 4), dtype=dtype, device=CPU, kernels=kernels)


@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_bfloat16_on_a_cpu_takes_the_fast_path(
    checkpoint: Checkpoint, kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    compiler()
    assert load(checkpoint, kernels).is_native
    assert SLOWLY not in caplog.text


def test_torch_is_taken_where_it_is_asked_for_and_with_an_attention_of_ones_own(checkpoint: Checkpoint) -> None:
    assert not load(checkpoint, "torch").is_native
    stage = Stage.load(
        checkpoint, LayerRange(0, 4), dtype=torch.bfloat16, device=CPU, attention=SdpaAttention(), kernels="auto"
    )
    assert not stage.is_native


def test_the_packed_copy_of_a_tied_head_counts(checkpoint: Checkpoint) -> None:
    compiler()
    embedding = checkpoint.config.vocab_size * checkpoint.config.hidden_size * 2
    stage = load(checkpoint, "native")
    stored = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()) * 2
    assert stage.weights_bytes >= stored + embedding


def test_float32_stays_on_torch_without_a_warning(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    assert not load(checkpoint, "auto", torch.float32).is_native
    assert not caplog.records
    with pytest.raises(ConfigError, match="bfloat16") as caught:
        load(checkpoint, "native", torch.float32)
    assert caught.value.field == "kernels"


def test_another_device_stays_on_torch_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config, elsewhere = family("llama-biases"), torch.device("meta")
    assert native_library("auto", config, torch.bfloat16, elsewhere) is None
    assert not caplog.records
    with pytest.raises(ConfigError, match="meta"):
        native_library("native", config, torch.bfloat16, elsewhere)


@pytest.mark.parametrize(("head_dim", "limit"), [(42, None), (MAX_HEAD_DIM + 64, MAX_HEAD_DIM)])
def test_a_head_that_does_not_fit_stays_on_torch_with_a_warning(
    head_dim: int, limit: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    compiler()
    config = family("llama-biases", head_dim=head_dim)
    with caplog.at_level(logging.WARNING):
        assert native_library("auto", config, torch.bfloat16, CPU) is None
    assert SLOWLY in caplog.text
    with pytest.raises(ConfigError) as caught:
        native_library("native", config, torch.bfloat16, CPU)
    assert caught.value.value == str(head_dim)
    assert caught.value.limit == str(limit or 2 * library.load().lanes)


def test_heads_of_48_fit_narrow_registers_only() -> None:
    compiler()
    fits = 48 % (2 * library.load().lanes) == 0
    config = family("llama-biases", head_dim=48)
    assert (native_library("auto", config, torch.bfloat16, CPU) is not None) == fits


def test_without_a_compiler_the_layers_run_on_torch_with_a_warning(
    checkpoint: Checkpoint, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not load(checkpoint, "auto").is_native
    assert SLOWLY in caplog.text
    assert "no C compiler here" in caplog.text
    with pytest.raises(ConfigError, match="no C compiler here") as caught:
        load(checkpoint, "native")
    assert caught.value.field == "kernels"
