"""Whatever is wrong with a model's small files, it is a typed error: they come from a shard."""

from __future__ import annotations

import pytest

from stagecoach.errors import CheckpointError
from stagecoach_router.text import model_text
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.model_text import ModelText


class Panic(BaseException):
    """As pyo3 raises one for a panic in Rust: no Exception."""


@pytest.mark.parametrize("error", [Panic("index out of bounds"), MemoryError(), RecursionError(), KeyError("model")])
async def test_an_error_that_nobody_foresaw_is_one_of_the_files(monkeypatch, error):
    def fail(files):
        raise error

    monkeypatch.setattr(model_text, "Tokenizer", fail)
    with pytest.raises(CheckpointError, match="cannot be used"):
        await ModelText.read(ModelFiles({}))


async def test_files_without_a_tokenizer_say_so():
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        await ModelText.read(ModelFiles({"config.json": b"{}"}))
