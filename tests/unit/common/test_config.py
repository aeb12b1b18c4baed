"""Settings: defaults < TOML < environment < flags; a mistake ends the start with a line that names it."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import Field

from stagecoach.errors import InvalidArgument
from stagecoach.process.settings import ProcessSettings, parse_size, read_settings


class Settings(ProcessSettings):
    """A process for the test."""

    model: str
    max_running: int = Field(8, ge=1)
    threads: int = 1
    size: str | None = None


def read(argv):
    return read_settings(Settings, "prog", argv, "PROG_TEST_")


def test_flags_go_before_the_environment_before_the_file_before_defaults(tmp_path, monkeypatch):
    file = tmp_path / "settings.toml"
    file.write_text('model = "from file"\nmax-running = 2\nthreads = 2\n')
    monkeypatch.setenv("PROG_TEST_MAX_RUNNING", "3")
    monkeypatch.setenv("PROG_TEST_THREADS", "3")
    settings = read(["--config", str(file), "--threads", "4"])
    assert (settings.model, settings.max_running, settings.threads, settings.size) == ("from file", 3, 4, None)


def test_a_file_may_be_a_pipe_and_has_an_end(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as writer:
        writer.submit(pipe.write_text, 'model = "from a pipe"')
        assert read(["--config", str(pipe)]).model == "from a pipe"
    with pytest.raises(SystemExit):
        read(["--config", "/dev/zero"])
    assert "error: config: /dev/zero has more than 1048576 characters" in capsys.readouterr().err


def test_settings_do_not_change():
    settings = read(["--model", "m"])
    with pytest.raises(ValueError, match="frozen"):
        settings.threads = 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: model: Field required"),
        (["--model", "m", "--max-running", "0"], "max-running: Input should be greater than or equal to 1"),
        (["--model", "m", "--threads", "many"], "threads: Input should be a valid integer"),
        (["--model", "m", "--nonsense", "1"], "nonsense"),
        (["--model", "m", "--config", "/nonexistent.toml"], "config: /nonexistent.toml"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        read(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nonsense = 1\nmodel = 'm'", "model = ", "[section]\nmodel = 'm'"])
def test_a_file_with_an_unknown_key_or_no_toml_is_refused(text, tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        read(["--config", str(file)])
    assert caught.value.code == 2
    assert "prog: error: " in capsys.readouterr().err


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        read(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config", "--model", "--max-running", "--threads"):
        assert flag in text


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1000", 1000), ("1K", 1024), ("1.5G", 3 * 2**29), ("512MiB", 2**29), (" 2 gb ", 2**31)]
)
def test_sizes(text, num_bytes):
    assert parse_size(text, "kv") == num_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1e9"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(InvalidArgument) as caught:
        parse_size(text, "kv")
    assert caught.value.field == "kv"
