"""A shard that lies, to be listed beside honest ones: in what it says it is, its files, its sessions and its credits.

It speaks the contract as far as it has to in order to be believed, and computes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort, to_status
from stagecoach.process import lifecycle
from stagecoach.process.listener import listen
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.framing import write_frame
from stagecoach.rpc.shard_rpc import SERVICE_NAME
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.pipelines.shard_client import describe
from stagecoach_router.pipelines.shard_files import fetch_files

FORGED = "\n12:00:00 INFO    stagecoach_router.server: all is well\x1b[2J\x1b[31m\r\u202e"
SIX_MIB = 6 << 20

Context = grpc.aio.ServicerContext[Any, Any]
# What a call does instead of answering.
Answer = bytes | errors.StagecoachError | None  # None: it never answers
Description = Callable[[pb.DescribeResponse], None]


def response(**kind: Any) -> bytes:
    """A frame of a session."""
    return write_frame(pb.SessionResponse(**kind))


OPENED = response(opened=pb.OpenResponse())


NOTHING = pb.StepResult(epoch=1, step=1)
ALIVE = response(load=pb.LoadReport(number=2**63))


def fault(text: str, **facts: Any) -> bytes:
    """As a shard sends it, but with a text of any length."""
    status = to_status(errors.ShardFault("x", **facts))
    status.message = text
    return response(fault=pb.Fault(epoch=1, step=1, status=status))


@dataclass(frozen=True, slots=True)
class Lie:
    """What is not as it is with honest shards. What is left out is as far as it goes.

    describe: changes the description. instead: what answers Describe. files: what FetchFiles sends. session: what is
    sent on a session, None for a pause without end. credits: what is sent on a Forward stream, None likewise.
    """

    describe: Description | None = None
    instead: Answer = b""
    files: Iterable[pb.FileChunk | None] | None = None
    is_itself: bool = True  # or says that it is the honest shard
    session: Iterable[bytes | errors.StagecoachError | None] = (OPENED, None)
    credits: Iterable[int | None] = (8, None)


def _set(**facts: Any) -> Description:
    def change(description: pb.DescribeResponse) -> None:
        for name, value in facts.items():
            owner, _, of_model = name.partition("__")
            setattr(description.model if of_model else description, of_model or owner, value)

    return change


def _endless() -> Iterable[pb.FileChunk]:
    while True:
        yield pb.FileChunk(name="weights.bin", data=bytes(1 << 20))


def _file(data: bytes) -> pb.FileChunk:
    return pb.FileChunk(name="tokenizer.json", data=data)


def _result(**facts: Any) -> bytes:
    return response(result=pb.StepResult(epoch=1, step=1, **facts))


DESCRIPTIONS = {
    "100 million blocks": Lie(describe=_set(num_blocks=100_000_000, num_free_blocks=100_000_000)),
    "2 billion blocks": Lie(describe=_set(num_blocks=2**31 - 1, num_free_blocks=2**31 - 1)),
    "more free blocks than blocks": Lie(describe=_set(num_free_blocks=2**32 - 1)),
    "a vocabulary of billions": Lie(describe=_set(model__vocab_size=2**32 - 1)),
    "a context of billions": Lie(describe=_set(model__context_length=2**31 - 1)),
    "another model": Lie(describe=_set(model__fingerprint="f" * 64)),
    "another protocol": Lie(describe=_set(protocol_version=99)),
    "a long device": Lie(describe=_set(device="x" * SIX_MIB)),
    "a forged hostname": Lie(describe=_set(hostname="h" + FORGED)),
    "a forged fingerprint": Lie(describe=_set(model__fingerprint="f" + FORGED)),
    "no bytes of ours": Lie(instead=b"\xff" * 1000),
    "our own kind of error": Lie(instead=errors.ConfigError("journal: " + FORGED)),
    "a mismatch": Lie(instead=errors.ModelMismatch(FORGED * 10)),
    "no permission": Lie(instead=errors.PermissionDenied("the certificate is for another name")),
    "never an answer": Lie(instead=None),
    "another's identity": Lie(is_itself=False),
}
FILES = {
    "no tokenizer": Lie(files=[]),
    "a broken tokenizer": Lie(files=[_file(b"{}")]),
    "a broken tokenizer, as described": Lie(describe=_set(files_digest="0" * 64), files=[_file(b"{}")]),
    "a tokenizer too large": Lie(files=[_file(bytes(100 << 20)), _file(bytes(100 << 20))]),
    "files without end": Lie(files=_endless()),
    "never a file": Lie(files=[None]),
}
SESSIONS = {
    "never opens": Lie(session=[None]),
    "ends at once": Lie(session=[]),
    "is full, always": Lie(session=[errors.KVCacheFull.of_blocks(needed=2, free=1)]),
    "refuses with our own kind of error": Lie(session=[errors.ConfigError(FORGED)]),
    "refuses with a mismatch": Lie(session=[errors.ModelMismatch("no")]),
    "no frame first": Lie(session=[b"\xff" * 1000, None]),
    "a fault first": Lie(session=[fault("no")]),
    "a fault of six megabytes": Lie(session=[OPENED, fault(FORGED * (SIX_MIB // len(FORGED)))]),
    "a fault with forged lines": Lie(session=[OPENED, fault(FORGED, addresses=[FORGED])]),
    "a fault that blames everybody": Lie(session=[OPENED, fault("x", addresses=[f"127.0.0.1:{p}" for p in range(99)])]),
    "no frame": Lie(session=[OPENED, b"\xff" * 1000]),
    "a result that nobody asked for": Lie(session=[OPENED, *[_result()] * 9, None]),
    "times that are no numbers": Lie(session=[OPENED, _result(timings=[pb.StageTiming(compute_s=math.nan)]), None]),
    "a result of any size": Lie(session=[OPENED, write_frame(pb.SessionResponse(result=NOTHING), [bytes(99 << 20)])]),
    "a step that does not come back": Lie(session=[OPENED, *[ALIVE] * 999, None]),
    "reports that cannot be": Lie(
        session=[OPENED, *[response(load=pb.LoadReport(compute_s=math.nan, num_steps=2**64 - 1))] * 99, None]
    ),
    "reports without end": Lie(session=[OPENED, *[response(load=pb.LoadReport())] * 100_000, None]),
    "a session that just ends": Lie(session=[OPENED]),
    "a session that says nothing": Lie(session=[OPENED, None]),
    "no credits": Lie(credits=[0, None]),
    "billions of credits": Lie(credits=[2**32 - 1, None]),
    "credits that nobody is owed": Lie(credits=[8, 8, 8, None]),
    "never a credit": Lie(credits=[None]),
    "an end of the stream": Lie(credits=[8]),
}  # fmt: skip
LIES = DESCRIPTIONS | FILES | SESSIONS


def random_lie(dice: random.Random) -> Lie:
    """Any of the lies about sessions and credits after any of those that leave the liar believable, or none."""
    chosen = [dice.choice(list(group.values())) for group in (DESCRIPTIONS, FILES, SESSIONS)]
    names = ("describe", "instead"), ("files",), ("session", "credits")
    facts = {
        name: getattr(lie, name)
        for lie, of_lie in zip(chosen, names, strict=True)
        for name in of_lie
        if dice.random() < 0.5
    }
    return Lie(**facts)


@dataclass
class LyingShard:
    """Says what the honest shard said whose `truth` it knows, except for `lie`. `address`: where it listens."""

    truth: pb.DescribeResponse
    files: dict[str, bytes]
    lie: Lie
    address: str
    asked: list[str] = field(default_factory=list)  # the calls that came

    async def start(self) -> None:
        self._server, _ = listen(MAX_SHARD_MESSAGE_BYTES, self.address)
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers: dict[str, Any] = {
            "Describe": unary(self._describe),  # type: ignore[arg-type]
            "Assign": unary(self._assign),  # type: ignore[arg-type]
            "FetchFiles": grpc.unary_stream_rpc_method_handler(self._fetch_files),  # type: ignore[arg-type]
            "Session": stream(self._session),  # type: ignore[arg-type]
            "Forward": stream(self._forward),  # type: ignore[arg-type]
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _describe(self, _: bytes, context: Context) -> bytes:
        self.asked.append("Describe")
        if self.lie.instead is None:
            await asyncio.Event().wait()
        if isinstance(self.lie.instead, errors.StagecoachError):
            await abort(context, self.lie.instead)
        if self.lie.instead:
            return bytes(self.lie.instead)
        said = pb.DescribeResponse()
        said.CopyFrom(self.truth)
        if self.lie.is_itself:
            said.shard_id = said.process_id = "liar"
        said.layers.start, said.layers.end = 0, said.model.num_layers  # one stage is preferred to two
        if self.lie.describe is not None:
            self.lie.describe(said)
        return said.SerializeToString()

    async def _assign(self, _: bytes, context: Context) -> bytes:
        await abort(context, errors.FailedPrecondition("it has layers"))
        raise AssertionError

    async def _fetch_files(self, _: bytes, context: Context) -> AsyncIterator[bytes]:
        self.asked.append("FetchFiles")
        honest = [pb.FileChunk(name=name, data=data) for name, data in self.files.items()]
        for chunk in honest if self.lie.files is None else self.lie.files:
            if chunk is None:
                await asyncio.Event().wait()
            else:
                yield chunk.SerializeToString()

    async def _session(self, _: object, context: Context) -> None:
        self.asked.append("Session")
        await context.read()
        for item in self.lie.session:
            if item is None:
                await asyncio.Event().wait()
            elif isinstance(item, errors.StagecoachError):
                await abort(context, item)
            else:
                await context.write(item)

    async def _forward(self, _: object, context: Context) -> None:
        self.asked.append("Forward")
        for credits in self.lie.credits:
            if credits is None:
                await asyncio.Event().wait()
            await context.write(pb.ForwardResponse(credits=credits).SerializeToString())


async def lie_beside(honest: str, address: str, lie: Lie, stop: asyncio.Event) -> None:
    """Lies at `address` about the model that the shard at `honest` serves, until `stop`."""
    shard = LyingShard((await describe(honest)).facts, await fetch_files(honest), lie, address)
    await shard.start()
    print(f"lying at {address}", flush=True)  # noqa: T201
    await stop.wait()
    await shard.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", required=True, help="HOST:PORT of an honest shard of the model")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--lie", required=True, choices=LIES)
    given = parser.parse_args()
    sys.exit(lifecycle.run("lying_shard", lambda stop: lie_beside(given.beside, given.listen, LIES[given.lie], stop)))


if __name__ == "__main__":
    main()
