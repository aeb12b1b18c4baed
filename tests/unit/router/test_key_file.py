"""The key file while a router runs."""

import asyncio
import logging
import os
import time

import pytest

from stagecoach.errors import ConfigError, RateLimited, Unauthenticated
from stagecoach.security.api_keys import Grant, new_entry, new_key, write_entry
from stagecoach_router.tenants.key_file import KeyFile

ANN, BOB = new_key(), new_key()


def entry(key, name, **limits):
    return write_entry(new_entry(key, name, Grant(**limits)))


def name_of(keys, key):
    try:
        return keys.tenants.identify([("authorization", f"Bearer {key}")]).name
    except Unauthenticated:
        return None


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(entry(ANN, "ann"))
    return path


async def test_a_changed_file_is_taken_over(path):
    keys = KeyFile(path)
    assert (name_of(keys, ANN), name_of(keys, BOB)) == ("ann", None)
    path.write_text(entry(BOB, "bob"))
    await keys.check()
    assert (name_of(keys, ANN), name_of(keys, BOB)) == (None, "bob")


async def test_a_link_that_is_turned_to_another_file_of_the_same_size_is_a_change(path, tmp_path):
    link, other = tmp_path / "link", tmp_path / "other.toml"
    other.write_text(entry(BOB, "bob"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    link.symlink_to(path)
    keys = KeyFile(link)
    link.unlink()
    link.symlink_to(other)
    await keys.check()
    assert (name_of(keys, ANN), name_of(keys, BOB)) == (None, "bob")


async def test_a_file_that_has_not_changed_is_not_read_again(path, caplog):
    caplog.set_level(logging.INFO)
    keys = KeyFile(path)
    ann = keys.tenants.identify([("authorization", f"Bearer {ANN}")])
    await keys.check()
    assert caplog.records == []
    assert keys.tenants.identify([("authorization", f"Bearer {ANN}")]) is ann


@pytest.mark.parametrize(
    "broken",
    [b"[[keys]]\nname = ", b"\xff\xfe", None, b"", b"# no key\nkeys = []\n", os.mkfifo, os.mkdir],
    ids=["half", "not text", "gone", "empty", "no keys", "a pipe that nobody writes to", "a folder"],
)
async def test_a_broken_file_leaves_the_keys_as_they_were_and_is_logged_once(path, caplog, broken):
    keys = KeyFile(path)
    if isinstance(broken, bytes):
        path.write_bytes(broken)
    else:
        path.unlink()
        if broken is not None:
            broken(path)
    async with asyncio.timeout(10):
        for _ in range(3):
            await keys.check()
    assert name_of(keys, ANN) == "ann"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(path) in caplog.text
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_text(entry(BOB, "bob"))
    await keys.check()
    assert (name_of(keys, ANN), name_of(keys, BOB)) == (None, "bob")


async def test_the_log_holds_no_key(path, caplog):
    caplog.set_level(logging.DEBUG)
    keys = KeyFile(path)
    path.write_text(entry(BOB, "bob").replace('sha256 = "', f'sha256 = "{BOB}'))
    await keys.check()
    path.write_text(entry(BOB, "bob"))
    await keys.check()
    assert len(caplog.records) == 2
    assert BOB not in caplog.text
    assert BOB.split("_", 2)[2] not in caplog.text


async def test_a_file_that_is_empty_for_a_moment_gives_nobody_new_limits(path):
    path.write_text(entry(ANN, "ann", requests_per_minute=1))
    keys = KeyFile(path)
    text = path.read_text()
    with keys.tenants.identify([("authorization", f"Bearer {ANN}")]).admit(time.monotonic()):
        pass
    for content in ("", text):
        path.write_text(content)
        await keys.check()
    with (
        pytest.raises(RateLimited),
        keys.tenants.identify([("authorization", f"Bearer {ANN}")]).admit(time.monotonic()),
    ):
        pytest.fail("it was let in")


@pytest.mark.parametrize("text", [None, "keys = 1", "", "keys = []"])
def test_a_file_that_cannot_be_used_at_the_start_is_an_error(tmp_path, text):
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.toml") as caught:
        KeyFile(path)
    assert caught.value.field == "api_keys"


def test_a_file_that_is_too_large_for_keys_is_not_read(path, monkeypatch):
    monkeypatch.setattr("stagecoach_router.tenants.key_file.MAX_FILE_BYTES", 1000)
    path.write_text(entry(ANN, "ann") + "#" * 1000)
    with pytest.raises(ConfigError, match="more than 1000 bytes"):
        KeyFile(path)
