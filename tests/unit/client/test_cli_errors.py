"""Wrong usage and errors of the commands: one line, an exit status, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stagecoach.errors import InvalidArgument, StagecoachError
from stagecoach_cli import run
from stagecoach_cli.options import parse_whole_numbers
from stagecoach_cli.terminal import describe, format_bytes, format_fraction, write_model_text


def test_field_and_limit_are_said_once() -> None:
    assert (
        describe(InvalidArgument("top_p must be in (0, 1]", field="top_p", limit="(0, 1]")) == "top_p must be in (0, 1]"
    )
    assert describe(InvalidArgument("too long", field="prompt", limit=512)) == "too long (field prompt, limit 512)"
    assert describe(StagecoachError("plain")) == "plain"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--temperature", "900"], "error: temperature must be a number in [0, 100]"),
        (["generate", "x", "--n", "0"], "error: n must be a whole number"),
        (["generate", "--token-ids", "1,x"], "error: token_ids must be whole numbers"),
        (["generate", "x", "--target", "nowhere"], "error: target must be HOST:PORT"),
        (["status", "--target", "http://x:1"], "error: target must be HOST:PORT"),
        (["bench", "--concurrency", "0"], "error: concurrency must be a whole number in [1, "),
        (["bench", "--concurrency", "one"], "error: concurrency must be whole numbers"),
        (["bench", "--json", "/nonexistent/folder/x.json"], "error: cannot write /nonexistent/folder/x.json"),
        (["up", "--model", "/nonexistent"], "error: /nonexistent is not a checkpoint folder"),
        (["up", "--model", "/nonexistent", "--listen", "x"], "error: "),
    ],
)
def test_an_error_is_one_line_and_status_1(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    written = capfd.readouterr().err
    assert written.startswith(message)
    assert written.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--token-ids", "1"],
        ["generate", "--chat", "--token-ids", "1"],
        ["generate", "x", "--max-tokens", "many"],
        ["nonsense"],
        ["up"],
        ["up", "--model", ".", "--dtype", "int3"],
        ["import", "only-one"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Usage" in capfd.readouterr().err


@pytest.mark.parametrize("command", [[], ["up"], ["chat"], ["generate"], ["status"], ["bench"], ["demo"], ["import"]])
def test_every_command_has_help(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    assert "Usage: stagecoach" in capfd.readouterr().out


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capfd.readouterr().out.startswith("stagecoach 0.")


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        (["up", "--model", "."], "torch", "[router] and [shard] extras"),
        (["demo", "--model", "."], "jinja2", "[router] and [shard] extras"),
        (["up", "--model", "."], "cryptography", "[cli] extra"),
        (["demo", "--model", "."], "cryptography", "[cli] extra"),
        (["certs", "x"], "cryptography", "[cli] extra"),
        (["import", "a.gguf", "b"], "gguf", "[import] extra"),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(
    command: list[str], missing: str, extra: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert run(command) == 1
    expected = f"error: stagecoach {command[0]} needs {missing}: install Stagecoach with its {extra}\n"
    assert capfd.readouterr().err == expected


def test_a_bench_that_fails_leaves_no_file_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    for file in (new, old):
        assert run(["bench", "--target", "127.0.0.1:1", "--json", str(file)]) == 1
    assert not new.exists()
    assert old.read_text() == "kept"


def test_counts() -> None:
    assert parse_whole_numbers("1,8, 32", "concurrency") == [1, 8, 32]


def test_what_a_model_writes_is_not_changed_on_its_way_to_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    write_model_text("a\x1b[31mb\n")
    assert capfd.readouterr().out == "a\x1b[31mb\n"


def test_sizes_and_fractions() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**31, 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "2.0 GiB",
        "1024.0 TiB",
    ]
    assert [format_fraction(f) for f in (None, 0.0, 0.756)] == ["-", "0%", "76%"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["keys", "new", "--name", "x"]])
def test_an_output_that_is_full_is_one_line_and_status_1(arguments: list[str]) -> None:
    command = [sys.executable, "-c", "from stagecoach_cli import main; main()", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_key_that_could_not_be_shown_gets_no_entry(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from stagecoach_cli import main; main()", "keys", "new", "--name", "x", "--file"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, str(tmp_path / "keys.toml")], stdout=full, timeout=60, check=False)
    assert ended.returncode == 1
    assert (tmp_path / "keys.toml").read_text() == ""
