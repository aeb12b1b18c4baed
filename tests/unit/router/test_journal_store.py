"""What is written to the journal is there when the next process opens it, and what is not ours is refused."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from stagecoach.errors import ConfigError, InvalidArgument, OutOfRange
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.durability.journal_store import Begin, End, Forget, JournalStore, Token
from stagecoach_router.requests.request import Request
from stagecoach_router.sampling.outputs import Sampled

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


def test_a_journal_says_which_model_it_is_of(path: Path) -> None:
    store = JournalStore(path)
    assert store.former_fingerprint == "", "a new one"
    store.check_model("f")
    assert reopened(store, path).former_fingerprint == "f"


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
    monkeypatch.setattr("stagecoach_router.durability.journal_store.LOCK_TIMEOUT_S", 0.01)
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


def test_a_file_that_others_could_read_is_closed_to_them(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    JournalStore(path).close()
    path.chmod(0o644)
    JournalStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "only its owner can" in caplog.text


def test_a_pipe_is_no_journal_and_nobody_waits_for_its_other_end(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        JournalStore(path)


def test_tokens_that_were_left_over_are_not_taken_for_those_of_a_new_request_of_that_id(path: Path) -> None:
    store = JournalStore(path)
    store.apply([token(0, 0, 7), token(0, 1, 8)])
    store.apply([begin()])
    assert [left.past for left in store.load()] == [[[], []]]


def test_a_request_that_is_begun_again_by_the_next_process_keeps_its_tokens(path: Path) -> None:
    store = JournalStore(path)
    store.apply([begin(), token(0, 0, 7)])
    store.apply([begin()])
    [left] = store.load()
    assert [sampled.token_id for sampled in left.past[0]] == [7]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE requests SET content = x'00'",
        "UPDATE requests SET content = '{}'",
        "UPDATE requests SET content = 'half'",
        "UPDATE requests SET content = replace(content, '[1, 2, 3]', '[1, 2.5]')",
        "UPDATE requests SET content = replace(content, '\"n\": 2', '\"n\": 10000000')",
        'UPDATE requests SET content = replace(content, \'"n": 2\', \'"n": "2"\')',
        "UPDATE requests SET content = replace(content, '\"n\": 2', '\"other\": 2')",
        "UPDATE requests SET content = replace(content, '-4', 'null')",
        "UPDATE requests SET content = printf('%.*c', 100000, '[')",
        "UPDATE requests SET digest = 'text', request_id = 'r-2'",
        "UPDATE requests SET cache_salt = 5",
        "UPDATE tokens SET completion = 2 WHERE completion = 1",
        "UPDATE tokens SET completion = -1 WHERE completion = 1",
        "UPDATE tokens SET position = 4 WHERE completion = 1",
        "UPDATE tokens SET token_id = -1",
        "UPDATE tokens SET token_id = 'seven'",
        "UPDATE tokens SET token_id = 4294967296",
        "UPDATE tokens SET logprobs = 'null'",
        "UPDATE tokens SET logprobs = '[-0.5, [[1]]]'",
        "UPDATE tokens SET logprobs = '[1e5, [[-1, 0.5]]]'",
    ],
)
def test_a_row_that_is_not_what_was_written_is_a_typed_error(path: Path, change: str) -> None:
    store = JournalStore(path)
    store.apply([begin(), token(0, 0, 7), token(1, 0, 8, -0.1)])
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute(change).rowcount
    db.close()
    store = JournalStore(path)
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        store.load()
    assert caught.value.field == "journal"
    store.close()
    JournalStore(path).close()  # the file is free again, though the error is still there


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "


@pytest.mark.parametrize(
    "change",
    [
        f"DROP TABLE meta; CREATE VIEW meta AS {ENDLESS} 'format' AS name, i AS value FROM n",
        f"DROP TABLE tokens; CREATE VIEW tokens AS {ENDLESS} i AS owner FROM n",
        "CREATE TRIGGER t AFTER INSERT ON requests BEGIN DELETE FROM tokens; END",
        "CREATE TABLE another (x)",
        "CREATE INDEX i ON requests (digest)",
        "; ".join(f"CREATE TABLE t{number} (x)" for number in range(50)),
    ],
)
def test_a_file_with_anything_else_in_it_is_refused_before_it_is_run(path: Path, change: str) -> None:
    JournalStore(path).close()
    with sqlite3.connect(path) as db:
        db.executescript(change)
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="no journal"):
        JournalStore(path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused(path: Path) -> None:
    store = JournalStore(path)
    store.apply([begin(), *(token(0, position, 7) for position in range(2000))])
    store.close()
    data = bytearray(path.read_bytes())
    for start in range(4096 * 5, len(data), 4096):  # the pages after the tables' first ones
        data[start : start + 100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="journal"):
        JournalStore(path).load()


def test_what_no_request_of_this_model_can_be_is_found(path: Path) -> None:
    store = JournalStore(path)
    store.apply([begin(), *(token(0, position, 7) for position in range(9))])
    [left] = store.load()
    left.check(vocab_size=20, context_length=20)
    with pytest.raises(InvalidArgument, match="vocabulary"):
        left.check(vocab_size=7, context_length=20)
    with pytest.raises(InvalidArgument, match="vocabulary"):
        left.check(vocab_size=3, context_length=20)
    with pytest.raises(OutOfRange, match="prompt"):
        left.check(vocab_size=20, context_length=3)
    store.apply([token(0, 9, 7)])
    [left] = store.load()
    with pytest.raises(InvalidArgument, match="9 of 2 were asked for"):
        left.check(vocab_size=20, context_length=20)
