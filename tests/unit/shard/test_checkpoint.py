"""A checkpoint folder is opened whole or refused with the file, field or tensor at fault."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stagecoach.errors import CheckpointError
from stagecoach_shard.checkpoints.tensor_table import read_header
from stagecoach_shard.models.families import open_checkpoint
from tests.unit.shard.tiny_models import MODELS, save_tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    save_tiny_model(path, MODELS["llama"])
    return path


def split_over_files(folder: Path, num_files: int = 3) -> None:
    """Turns the single tensor file into an index and several files."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for index in range(num_files):
        name = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = dict(sorted(tensors.items())[index::num_files])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value


def test_it_is_named_after_its_folder_and_reads_no_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.name == "tiny"
    assert checkpoint.config.num_layers == 4
    assert checkpoint.names_read == []


def test_it_lists_the_tokenizer_files_that_are_there(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("")
    (folder / "merges.txt").write_text("")
    names = {"tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"}
    files = open_checkpoint(folder).tokenizer_files()
    assert files == {name: folder / name for name in names}


def test_one_file_or_several_are_the_same_model(folder: Path) -> None:
    single = open_checkpoint(folder)
    split_over_files(folder)
    several = open_checkpoint(folder)
    assert several.fingerprint == single.fingerprint
    assert several.tensors.keys() == single.tensors.keys()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": '])
def test_a_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refused(folder).field == "config.json"


def test_missing_files_are_named(folder: Path) -> None:
    assert refused(folder / "nowhere").field == "path"
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert refused(folder).field == SINGLE
    (folder / "config.json").unlink()
    assert refused(folder).field == "config.json"


def test_a_missing_file_of_the_index_is_named(folder: Path) -> None:
    split_over_files(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refused(folder).field == "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors", INDEX])
def test_a_pipe_that_nobody_writes_to_is_refused_by_name(folder: Path, name: str) -> None:
    split_over_files(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refused(folder).field in (name, SINGLE)


@pytest.mark.parametrize(
    "file", ["../model-00001-of-00003.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", ""]
)
def test_an_index_cannot_name_files_outside_its_folder(folder: Path, file: str) -> None:
    split_over_files(folder)
    save_file({"model.norm.weight": torch.ones(48)}, folder.parent / "model-00001-of-00003.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    error = refused(folder)
    assert (error.field, error.value) == (INDEX, file)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    split_over_files(folder)
    (folder / INDEX).write_text(text)
    assert refused(folder).field == INDEX


def test_a_tensor_that_is_not_where_the_index_says_is_named(folder: Path) -> None:
    split_over_files(folder)

    def misplace(index: dict[str, Any]) -> None:
        files = sorted(set(index["weight_map"].values()))
        here = index["weight_map"]["model.norm.weight"]
        index["weight_map"]["model.norm.weight"] = next(file for file in files if file != here)

    edit_json(folder / INDEX, misplace)
    assert refused(folder).field == "model.norm.weight"


def test_a_truncated_file_is_refused_by_name(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-100])
    error = refused(folder)
    assert error.field == SINGLE
    assert "truncated" in error.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1\2\3",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / SINGLE).write_bytes(data)
    assert refused(folder).field == SINGLE


def one_tensor(dtype: object = "F32", shape: object = (1,), data_offsets: object = (0, 4)) -> dict[str, object]:
    return {"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}}


@pytest.mark.parametrize(
    "header",
    [
        {"a.weight": {}},
        {"a.weight": []},
        one_tensor(dtype="F12"),
        one_tensor(dtype="NaN"),
        one_tensor(shape=[-1]),
        one_tensor(shape=[1.0]),
        one_tensor(shape=[float("nan")]),
        one_tensor(shape=[2]),
        one_tensor(shape=[2**63, 2**63]),
        one_tensor(data_offsets=[4, 8]),
        one_tensor(data_offsets=[0]),
        one_tensor(data_offsets=[4, 0]),
        {**one_tensor(), "b.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},  # the same bytes
        {**one_tensor(dtype="U8", data_offsets=[0, 1]), "b": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}},
    ],
)
def test_a_malformed_header_is_refused_by_the_files_name(tmp_path: Path, header: dict[str, object]) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.field == SINGLE


def test_a_name_that_stands_twice_in_a_header_is_one_tensor_or_refused(tmp_path: Path) -> None:
    for first, end in (((0, 4), 4), ((4, 8), 8)):
        entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
        text = f"{{{entry % first}, {entry % (0, 4)}}}".encode()
        path = tmp_path / SINGLE
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * end)
        with contextlib.suppress(CheckpointError):
            assert list(read_header(path)) == ["a"]


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**64 - 1]])
def test_a_size_that_no_tensor_has_is_refused_by_the_tensors_name(folder: Path, shape: list[int]) -> None:
    """It takes no bytes, so that a file may say so; nothing is made of it."""
    path = folder / SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"spare": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert refused(folder).field == "spare"


@given(data=st.binary(max_size=64), length=st.one_of(st.none(), st.integers(0, 64)))
def test_any_bytes_at_all_are_refused_or_read_never_worse(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data if length is None else struct.pack("<Q", length) + data)
    with contextlib.suppress(CheckpointError):
        assert all(entry.file == path for entry in read_header(path).values())


def test_more_layers_than_the_configuration_knows_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3))
    assert refused(folder).field == "num_hidden_layers"
