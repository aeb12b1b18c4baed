"""A checkpoint is described when it is opened and read later: what has changed meanwhile is not served as the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stagecoach.errors import CheckpointError
from stagecoach.topology import LayerRange
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.stage_loader import Loader
from tests.unit.shard.stage_chain import CPU
from tests.unit.shard.test_checkpoint import split_over_files
from tests.unit.shard.tiny_models import MODELS, save_tiny_model

SINGLE = "model.safetensors"


def loader_of(folder: Path) -> Loader:
    return Loader(
        checkpoint=open_checkpoint(folder),
        device=CPU,
        dtype=torch.float32,
        kernels="torch",
        num_threads=1,
        block_size=16,
        kv_cache_memory="1M",
        kv_cache_fraction=0.3,
        abandoned=threading.Event(),
    )


def load(loader: Loader) -> None:
    loader.load(LayerRange(0, 2)).stop()


def write_over(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\x01\x02\x03\x04")


def put_another_in_its_place(path: Path) -> None:
    """As a download does, with the time of the former one."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [write_over, put_another_in_its_place, Path.unlink])
@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_files_that_changed_are_not_loaded_under_the_former_fingerprint(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    save_tiny_model(tmp_path, MODELS["llama"])
    loader = loader_of(tmp_path)
    load(loader)
    change(tmp_path / name)
    with pytest.raises(CheckpointError, match="start the shard again") as caught:
        load(loader)
    assert caught.value.field == name


def test_files_that_change_while_they_are_read_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, MODELS["llama"])
    split_over_files(tmp_path)
    loader = loader_of(tmp_path)
    read = Stage.load

    def read_and_change(*arguments, **options):
        stage = read(*arguments, **options)
        write_over(next(tmp_path.glob("*.safetensors")))
        return stage

    monkeypatch.setattr(Stage, "load", read_and_change)
    with pytest.raises(CheckpointError, match="start the shard again"):
        load(loader)


def test_another_chat_template_is_no_reason_to_load_nothing(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, MODELS["llama"])
    loader = loader_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    load(loader)
