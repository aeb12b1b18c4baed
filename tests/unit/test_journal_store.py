"""What is written to the journal is there when the next process opens it, and what is not ours is refused."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from stagecoach.errors import ConfigError
from stagecoach.sampling import SamplingParams
from stagecoach_router.journal_store import Begin, End, Forget, JournalStore, Token
from stagecoach_router.outputs import Sampled
from stagecoach_router.request import Request

KEY = ("tenant", "r-1")
PARAMS = SamplingParams(
    temperature=0.7, logit_bias={5: 1.5}, seed=2**64 - 1, max_tokens=9, stop=("ä", "b"), stop_token_ids=(3,), n=2
)
REQUEST = Request("r-1", (1, 2, 3), PARAMS, priority=-4, cache_salt=b"\x00salt")


def begin(key: tuple[str, str] = KEY) -> Begin:
    return Begin(key, b"digest", REQUEST)


def token(completion: int, position: int, token_id: int, logprob: float | None = None) -> Token:
    top = () if logprob is None else ((token_id, logprob), (9, -2.5))
    return Token(KEY, completion, position, Sampled(token_id, logprob, top))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def reopened(store: JournalStore, path: Path) -> JournalStore:
    store.close()
    return JournalStore(path)


def test_a_request_comes_back_with_its_tokens(path: Path) -> None:
    store = JournalStore(path)
    store.apply([begin(), token(0, 0, 7), token(1, 0, 8, -0.1)])
    store.apply([token(0, 1, 6)])
    [left] = reopened(store, path).load()
    assert (left.key, left.digest, left.request) == (KEY, b"digest", REQUEST)
    assert left.past == [
        [Sampled(7, None, ()), Sampled(6, None, ())],
        [Sampled(8, -0.1, ((8, -0.1), (9, -2.5)))],
    ]


def test_requests_come_back_in_the_order_in_which_they_were_accepted(path: Path) -> None:
    store = JournalStore(path)
    keys = [("", name) for name in "cab"]
    store.apply([begin(key) for key in keys])
    assert [left.key for left in reopened(store, path).load()] == keys


def test_what_is_forgotten_or_long_finished_is_gone_with_its_tokens(path: Path) -> None:
    store = JournalStore(path)
    other = ("", "other")
    store.apply([begin(), token(0, 0, 7), End(KEY, 100.0), begin(other)])
    store.apply([End(KEY, 900.0)])
    store.drop_finished_before(100.0)
    assert [left.key for left in store.load()] == [KEY, other]
    store.drop_finished_before(100.5)
    assert [left.key for left in store.load()] == [other]
    store.apply([Forget(other), begin()])
    [left] = store.load()
    assert left.past == [[], []]


def test_a_transaction_that_fails_leaves_nothing(path: Path) -> None:
    store = JournalStore(path)
    broken: Any = object()
    with pytest.raises(sqlite3.Error):
        store.apply([begin(), token(0, 0, 7), End(KEY, broken)])
    assert store.load() == []


def test_another_models_journal_is_refused(path: Path) -> None:
    store = JournalStore(path)
    store.check_model("f00d")
    store = reopened(store, path)
    store.check_model("f00d")
    with pytest.raises(ConfigError, match="of model f00d, not the shards' beef") as caught:
        store.check_model("beef")
    assert caught.value.field == "journal"


def test_another_format_is_refused(path: Path) -> None:
    JournalStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '99'")
    db.close()
    with pytest.raises(ConfigError, match="of format 99"):
        JournalStore(path)


def test_a_file_that_is_something_else_is_refused_and_left_alone(path: Path) -> None:
    path.write_text("not a database, but a text that is somebody's\n" * 100)
    with pytest.raises(ConfigError, match="no journal"):
        JournalStore(path)
    assert path.read_text().startswith("not a database")
    with sqlite3.connect(other := path.with_name("other")) as db:
        db.execute("CREATE TABLE meta_of_somebody (x)")
    db.close()
    with pytest.raises(ConfigError):
        JournalStore(other)
    with pytest.raises(ConfigError, match="nowhere"):
        JournalStore(path.parent / "nowhere" / "journal")


def test_two_routers_cannot_have_the_same_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecoach_router.journal_store.LOCK_TIMEOUT_S", 0.01)
    store = JournalStore(path)
    with pytest.raises(ConfigError, match="another router"):
        JournalStore(path)
    JournalStore.close(store)
    JournalStore(path).close()


def test_only_its_owner_can_read_it(path: Path) -> None:
    store = JournalStore(path)
    store.apply([begin()])
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
