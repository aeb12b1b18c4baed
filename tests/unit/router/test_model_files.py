from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach.errors import CheckpointError
from stagecoach_router.text import model_files
from stagecoach_router.text.model_files import ModelFiles


def test_reads_the_known_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    (tmp_path / "model.safetensors").write_bytes(b"large")
    files = ModelFiles.from_folder(tmp_path)
    assert files.json("config.json") == {"vocab_size": 3}
    assert "model.safetensors" not in files


def test_an_absent_file_is_an_empty_object_but_has_no_bytes() -> None:
    files = ModelFiles({})
    assert files.json("generation_config.json") == {}
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        files["tokenizer.json"]
    assert caught.value.field == "tokenizer.json"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_broken_file_is_named(content: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelFiles({"config.json": content}).json("config.json")
    assert caught.value.field == "config.json"


def test_a_file_past_its_limit_is_refused(tmp_path: Path) -> None:
    limit = model_files.MAX_FILE_BYTES["config.json"]
    with pytest.raises(CheckpointError) as caught:
        ModelFiles({"config.json": b" " * (limit + 1)})
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("config.json", str(limit), str(limit + 1))
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises(CheckpointError, match="at most"):
        ModelFiles.from_folder(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        ModelFiles.from_folder(tmp_path / "nothing")
