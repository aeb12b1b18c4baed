"""The model's small files come from any shard that has them: another one after a failure, at any speed but none."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc.aio
import pytest

from stagecoach.errors import ShardFault, Unavailable
from stagecoach.model_files import MAX_FILE_BYTES, files_digest
from stagecoach.v1 import shard_pb2
from stagecoach_router.pipelines import shard_files
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.shard_files import ShardFiles, fetch_files

FILES = {"tokenizer.json": b"{}" * 50, "config.json": b"{}"}
DIGEST = files_digest(FILES)


def chunks_of(files, size=30):
    for name, data in files.items():
        for start in range(0, len(data), size):
            yield shard_pb2.FileChunk(name=name, data=data[start : start + size])


class FakeShards:
    """By address, what each sends: chunks, pauses in seconds, and errors to raise. `asked`: whom, in order.

    most_at_once: the most connections that there were.
    """

    def __init__(self, **sent):
        self.sent = {f"{name}:1": sent for name, sent in sent.items()}
        self.asked = []
        self.num_open = self.most_at_once = 0

    @asynccontextmanager
    async def dial(self, address):
        self.num_open += 1
        self.most_at_once = max(self.most_at_once, self.num_open)
        try:
            yield SimpleNamespace(address=address)
        finally:
            self.num_open -= 1

    def stub(self, channel):
        self.asked.append(channel.address)
        items = iter(self.sent[channel.address])

        async def read():
            for item in items:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, Exception):
                    raise item
                else:
                    return item
            return grpc.aio.EOF

        return SimpleNamespace(fetch_files=lambda request: SimpleNamespace(read=read))


@pytest.fixture
def fake(monkeypatch):
    def make(**sent):
        shards = FakeShards(**sent)
        monkeypatch.setattr(shard_files, "ShardStub", shards.stub)
        return shards

    monkeypatch.setattr(shard_files, "MAX_SILENCE_S", 0.1)
    return make


def said(name, digest=DIGEST):
    return ShardDescription(f"{name}:1", shard_pb2.DescribeResponse(files_digest=digest))


async def test_the_files_come_from_one_shard(fake):
    shards = fake(a=chunks_of(FILES), b=[])
    assert await ShardFiles(shards.dial).fetch([said("a"), said("b")]) == FILES
    assert shards.asked == ["a:1"]


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [Unavailable("refused")],
        list(chunks_of(FILES))[:-2],
        [*chunks_of(FILES), shard_pb2.FileChunk(name="config.json", data=b" ")],
        list(chunks_of({"config.json": b"{}"})),
        [*list(chunks_of(FILES))[:2], 5.0],
        [*list(chunks_of(FILES))[:2], Unavailable("gone in the middle")],
        [shard_pb2.FileChunk(name="config.json", data=b" " * (1 << 20))] * 2,
    ],
    ids=["none", "refused", "half", "changed", "no tokenizer", "stops", "breaks", "too large"],
)
async def test_one_that_fails_is_followed_by_the_next_and_comes_last_from_then_on(fake, sent):
    shards = fake(a=sent, b=chunks_of(FILES), c=chunks_of(FILES))
    files = ShardFiles(shards.dial)
    everybody = [said("a"), said("b"), said("c")]
    assert await files.fetch(everybody) == FILES
    assert shards.asked == ["a:1", "b:1"]
    shards.sent["b:1"] = [Unavailable("gone")]
    shards.asked.clear()
    assert await files.fetch(everybody) == FILES
    assert shards.asked == ["b:1", "c:1"]


async def test_where_all_fail_all_reasons_are_told_and_waiting_may_help(fake):
    shards = fake(a=[Unavailable("a:1: refused")], b=[])
    with pytest.raises(Unavailable, match=r"a:1: refused.*b:1 has no tokenizer\.json"):
        await ShardFiles(shards.dial).fetch([said("a"), said("b")])


async def test_who_says_that_it_has_no_files_is_not_asked_as_long_as_others_have_them(fake):
    shards = fake(a=[], b=chunks_of(FILES))
    assert await ShardFiles(shards.dial).fetch([said("a", ""), said("b")]) == FILES
    assert shards.asked == ["b:1"]


async def test_a_slow_shard_may_take_far_longer_in_all_than_between_two_chunks(fake, monkeypatch):
    monkeypatch.setattr(shard_files, "MIN_BYTES_PER_S", 100)
    pauses = [item for chunk in chunks_of(FILES, size=10) for item in (0.03, chunk)]
    shards = fake(a=pauses)
    assert await fetch_files("a:1", shards.dial) == FILES  # in 0.33 s, of which 0.1 may be silent


async def test_a_trickle_is_no_progress(fake, monkeypatch):
    monkeypatch.setattr(shard_files, "MIN_BYTES_PER_S", 1 << 20)
    shards = fake(a=[item for _ in range(1000) for item in (0.01, shard_pb2.FileChunk(name="config.json", data=b"x"))])
    with pytest.raises(Unavailable, match="bytes of its files came in"):
        async with asyncio.timeout(5.0):
            await fetch_files("a:1", shards.dial)


async def test_what_nobody_reads_is_no_progress(fake, monkeypatch):
    spam = shard_pb2.FileChunk(name="weights.bin", data=bytes(1 << 20))
    shards = fake(a=[item for _ in range(100) for item in (0.01, spam)])
    with pytest.raises(Unavailable, match="a:1: 0 bytes of its files came in"):
        async with asyncio.timeout(5.0):
            await fetch_files("a:1", shards.dial)


async def test_beside_one_that_is_slow_the_next_is_asked_and_the_first_to_be_through_is_taken(fake, monkeypatch):
    """One that lies may send a little for as long as its files may be large."""
    monkeypatch.setattr(shard_files, "PATIENCE_S", 0.02)
    monkeypatch.setattr(shard_files, "MAX_SILENCE_S", 30.0)
    shards = fake(a=[*list(chunks_of(FILES))[:2], 30.0], b=chunks_of(FILES), c=chunks_of(FILES))
    async with asyncio.timeout(5.0):
        assert await ShardFiles(shards.dial).fetch([said("a"), said("b"), said("c")]) == FILES
    assert shards.asked == ["a:1", "b:1"]
    assert shards.num_open == 0


async def test_one_that_was_too_slow_is_asked_last_from_then_on(fake, monkeypatch):
    monkeypatch.setattr(shard_files, "PATIENCE_S", 0.02)
    monkeypatch.setattr(shard_files, "MAX_SILENCE_S", 30.0)
    shards = fake(a=[30.0], b=chunks_of(FILES))
    files = ShardFiles(shards.dial)
    async with asyncio.timeout(5.0):
        await files.fetch([said("a"), said("b")])
        shards.sent["b:1"] = chunks_of(FILES)
        shards.asked.clear()
        await files.fetch([said("a"), said("b")])
    assert shards.asked == ["b:1"]


async def test_who_was_slow_only_may_be_the_one_that_is_taken(fake, monkeypatch):
    monkeypatch.setattr(shard_files, "PATIENCE_S", 0.01)
    monkeypatch.setattr(shard_files, "MAX_SILENCE_S", 30.0)
    shards = fake(a=[0.05, *chunks_of(FILES)], b=[30.0])
    async with asyncio.timeout(5.0):
        assert await ShardFiles(shards.dial).fetch([said("a"), said("b")]) == FILES


async def test_only_a_few_send_at_the_same_time(fake, monkeypatch):
    monkeypatch.setattr(shard_files, "PATIENCE_S", 0.001)
    shards = fake(**{name: [30.0] for name in "abcdef"})
    with pytest.raises(Unavailable):  # all are silent for too long, the last ones after the first
        async with asyncio.timeout(5.0):
            await ShardFiles(shards.dial).fetch([said(name) for name in "abcdef"])
    assert shards.most_at_once == shard_files.MAX_AT_ONCE


async def test_files_that_nobody_reads_are_not_kept_and_end_too(fake, monkeypatch):
    monkeypatch.setattr(shard_files, "MAX_FILES_BYTES", 1000)
    spam = shard_pb2.FileChunk(name="weights.bin", data=bytes(100))
    shards = fake(a=[spam, *chunks_of(FILES)], b=[spam] * 11)
    assert await fetch_files("a:1", shards.dial) == FILES
    with pytest.raises(ShardFault) as caught:
        await fetch_files("b:1", shards.dial)
    assert (caught.value.field, caught.value.limit) == ("files", "1000")


async def test_no_file_is_larger_than_a_router_reads(fake):
    name, limit = "special_tokens_map.json", MAX_FILE_BYTES["special_tokens_map.json"]
    shards = fake(a=[shard_pb2.FileChunk(name=name, data=bytes(limit)), shard_pb2.FileChunk(name=name, data=b"x")])
    with pytest.raises(ShardFault) as caught:
        await fetch_files("a:1", shards.dial)
    assert (caught.value.field, caught.value.limit, caught.value.value) == (name, str(limit), str(limit + 1))
