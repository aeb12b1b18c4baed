"""The fingerprint tells models apart, and only models."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagecoach.model_files import files_digest
from stagecoach_shard.models.families import open_checkpoint
from tests.unit.shard.tiny_models import MODELS, save_tiny_model

SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path, MODELS["llama"])
    return tmp_path


def _fingerprint(folder: Path) -> str:
    return open_checkpoint(folder).fingerprint


def _edit_config(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_it_is_a_sha256_and_the_same_each_time(folder: Path) -> None:
    fingerprint = _fingerprint(folder)
    assert len(bytes.fromhex(fingerprint)) == 32
    assert _fingerprint(folder) == fingerprint


def test_two_finetunes_of_one_architecture_differ(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "a", MODELS["llama"], seed=1)
    save_tiny_model(tmp_path / "b", MODELS["llama"], seed=2)
    assert _fingerprint(tmp_path / "a") != _fingerprint(tmp_path / "b")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_a_finetune_of_a_single_tensor_differs(folder: Path, name: str) -> None:
    before = _fingerprint(folder)
    tensors = load_file(folder / SINGLE)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / SINGLE)
    assert _fingerprint(folder) != before


def test_a_dtype_differs(folder: Path) -> None:
    before = _fingerprint(folder)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)
    assert _fingerprint(folder) != before


def test_of_the_configuration_only_what_is_computed_with_counts(folder: Path) -> None:
    before = _fingerprint(folder)
    _edit_config(folder, transformers_version="0.0", use_cache=False, bos_token_id=5)
    assert _fingerprint(folder) == before
    _edit_config(folder, rms_norm_eps=1e-3)
    assert _fingerprint(folder) != before


def test_a_large_file_is_sampled_not_read(folder: Path) -> None:
    """Half a gigabyte, sparse on disk: reading it all would take far longer than the samples do."""
    path, stranger = folder / SINGLE, 1 << 29
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["spare"] = {"dtype": "U8", "shape": [stranger], "data_offsets": [end, end + stranger]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end + stranger)
    start = time.process_time()
    before = _fingerprint(folder)
    assert time.process_time() - start < 0.2
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert _fingerprint(folder) != before, "the last byte is in the last window"


def test_small_files_are_told_apart_by_a_digest_of_their_own(folder: Path) -> None:
    assert open_checkpoint(folder).files_digest == "", "without a tokenizer they are of no use to a router"
    (folder / "tokenizer.json").write_text("{}")
    first = open_checkpoint(folder)
    assert len(bytes.fromhex(first.files_digest)) == 32
    (folder / "tokenizer_config.json").write_text("{}")
    other = open_checkpoint(folder)
    assert other.files_digest != first.files_digest
    assert other.fingerprint == first.fingerprint


def test_the_digest_is_over_the_files_that_a_router_gets(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    served = {name: path.read_bytes() for name, path in checkpoint.tokenizer_files().items()}
    assert files_digest(served) == checkpoint.files_digest
    with (folder / "config.json").open("a") as file:
        file.write(" " * (1 << 20))
    assert "config.json" not in open_checkpoint(folder).tokenizer_files(), "larger than any router takes"
