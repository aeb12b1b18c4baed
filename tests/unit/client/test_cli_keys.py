"""`stagecoach keys new`."""

import stat

import pytest

from stagecoach.security.api_keys import Grant, key_id, key_sha256, read_entries
from stagecoach_cli import run


def test_it_prints_the_entry_and_at_last_the_key(capsys):
    assert run(["keys", "new", "--name", "billing"]) == 0
    shown = capsys.readouterr().out
    key = shown.splitlines()[-1]
    (entry,) = read_entries(shown.removesuffix(f"{key}\n"))
    assert (entry.name, entry.id, entry.sha256) == ("billing", key_id(key), key_sha256(key))
    assert entry.grant == Grant(max_priority=0)


def test_with_a_file_it_adds_the_entry_and_prints_the_key_alone(capsys, tmp_path):
    file = tmp_path / "keys.toml"
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "1000", "--max-concurrent", "4"]
    rest = ["--model", "small", "--model", "large", "--max-priority", "2", "--shares-cache"]
    assert run(["keys", "new", "--name", "ann", "--file", str(file), *limits, *rest]) == 0
    first = capsys.readouterr().out.removesuffix("\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("# ours\n" + file.read_text().rstrip("\n"))
    assert run(["keys", "new", "--name", "bob", "--file", str(file)]) == 0
    second = capsys.readouterr().out.removesuffix("\n")
    ann, bob = read_entries(file.read_text())
    assert (ann.sha256, bob.sha256) == (key_sha256(first), key_sha256(second))
    assert ann.grant == Grant(60, 1000, 4, ("small", "large"), 2, True)
    assert file.read_text().startswith("# ours\n")
    assert first not in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a b"], "error: name: 1 to 64 letters"),
        (["--name", "a", "--requests-per-minute", "0"], "error: requests_per_minute: a whole number in [1, "),
        (["--name", "a", "--file", "/dev/null/keys.toml"], "error: cannot write /dev/null/keys.toml: "),
    ],
)
def test_what_cannot_be_is_one_line(capsys, arguments, message):
    assert run(["keys", "new", *arguments]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(message)


def test_a_file_that_would_not_hold_together_is_left_as_it_is(capsys, tmp_path):
    file = tmp_path / "keys.toml"
    assert run(["keys", "new", "--name", "ann", "--file", str(file)]) == 0
    before = file.read_bytes()
    assert run(["keys", "new", "--name", "ann", "--max-concurrent", "1", "--file", str(file)]) == 1
    assert "the limits differ from those of an earlier key of ann" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_help_does_not_show_the_environments_key(capsys, monkeypatch):
    monkeypatch.setenv("STAGECOACH_API_KEY", "not-to-be-shown")
    assert run(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "STAGECOACH_API_KEY" in shown
    assert "not-to-be-shown" not in shown
