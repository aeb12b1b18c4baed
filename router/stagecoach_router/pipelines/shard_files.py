"""The small files of the model, from whichever shard has them and answers.

One that fails, is too slow or sends something else than its digest says is asked again after all others. One that has
not sent all after a while goes on, and the next one is asked beside it: whoever has sent all first is taken.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.model_files import MAX_FILE_BYTES, files_digest
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.v1 import shard_pb2
from stagecoach_router.pipelines.shard_description import ShardDescription

logger = logging.getLogger(__name__)

# A shard that sends nothing for so long is given up, however much it has sent.
MAX_SILENCE_S = 20.0
# So is one that sends a little all the time: beyond the first MAX_SILENCE_S it has to come to this on the average.
# 35 MB take 28 s at 10 Mbit/s, and 9 minutes at this.
MIN_BYTES_PER_S = 64 << 10
# After so long the next shard is asked, too, until so many send at the same time. Each may cost this process the memory
# of its files.
PATIENCE_S = 20.0
MAX_AT_ONCE = 4
# Of all that is sent, whether it is read here or not.
MAX_FILES_BYTES = 256 << 20


class ShardFiles:
    """Fetches the small files of a model that several shards have."""

    def __init__(self, dial: Dial = dial_plainly) -> None:
        self._dial = dial
        self._failed: dict[str, float] = {}  # when a shard, by its address, failed last

    async def fetch(self, shards: Sequence[ShardDescription]) -> dict[str, bytes]:
        """The files by name, from one of `shards`, all of one model. Raises Unavailable where none has sent them.

        Only those are asked that say they have the files; all, where none says so.
        """
        asked = [shard for shard in shards if shard.facts.files_digest] or list(shards)
        waiting = deque(sorted(asked, key=lambda shard: self._failed.get(shard.address, 0.0)))
        tasks: list[asyncio.Task[dict[str, bytes]]] = []
        sending = set(tasks)  # those that have not ended
        reasons = []
        try:
            while waiting or sending:
                if waiting and len(sending) < MAX_AT_ONCE:
                    tasks.append(asyncio.create_task(self._fetch_from(waiting.popleft())))
                    sending.add(tasks[-1])
                may_ask_more = bool(waiting) and len(sending) < MAX_AT_ONCE
                ended, sending = await asyncio.wait(
                    sending, timeout=PATIENCE_S if may_ask_more else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in ended:
                    try:
                        return task.result()
                    except errors.StagecoachError as error:
                        reasons.append(str(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise errors.Unavailable("; ".join(reasons) or "no shard has the model's small files")

    async def _fetch_from(self, shard: ShardDescription) -> dict[str, bytes]:
        try:
            files = await fetch_files(shard.address, self._dial)
            check_files(shard, files)
        except (errors.StagecoachError, asyncio.CancelledError):  # another one was faster
            self._failed[shard.address] = time.monotonic()
            raise
        logger.info("the model's small files come from %s", shard.address)
        return files


def check_files(shard: ShardDescription, files: dict[str, bytes]) -> None:
    """Raises ShardFault where these are not the files that the shard said it has, or no tokenizer is among them."""
    came = files_digest(files)
    if not came:
        text = f"{shard.address} has no tokenizer.json"
        raise errors.ShardFault(text, field="tokenizer.json", addresses=[shard.address])
    said = shard.facts.files_digest
    if said and came != said:
        text = f"{shard.address} said that its small files are {said}, and sent {came}"
        raise errors.ShardFault(text, field="files_digest", limit=said, value=came, addresses=[shard.address])


async def fetch_files(address: str, dial: Dial = dial_plainly) -> dict[str, bytes]:
    """The small files of a shard's checkpoint, by name; those that nobody here reads are left out.

    Raises Unavailable for one that is silent or too slow, ShardFault for files that are too large, and what the shard
    refuses it with.
    """
    files: dict[str, bytearray] = {}
    began, num_bytes, num_kept_bytes = time.monotonic(), 0, 0
    async with dial(address) as channel:
        call = ShardStub(channel).fetch_files(shard_pb2.FetchFilesRequest())
        try:
            while True:
                allowed_s = MAX_SILENCE_S + num_kept_bytes / MIN_BYTES_PER_S - (time.monotonic() - began)
                async with asyncio.timeout(min(MAX_SILENCE_S, allowed_s)):
                    chunk = await call.read()
                if not isinstance(chunk, shard_pb2.FileChunk):
                    break
                num_bytes += len(chunk.data)
                if num_bytes > MAX_FILES_BYTES:
                    text = f"{address}: files of more than {MAX_FILES_BYTES} bytes"
                    raise errors.ShardFault(text, field="files", limit=MAX_FILES_BYTES, addresses=[address])
                num_kept_bytes += _append(files, chunk, address)  # what nobody reads is no progress
        except TimeoutError:
            text = f"{address}: {num_kept_bytes} bytes of its files came in {time.monotonic() - began:.0f} s"
            raise errors.Unavailable(text, addresses=[address]) from None
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address, names_peer=True) from error
    return {name: bytes(data) for name, data in files.items()}


def _append(files: dict[str, bytearray], chunk: shard_pb2.FileChunk, address: str) -> int:
    """Adds a part of a file, as far as it is one that is read here. Returns how many bytes that are."""
    limit = MAX_FILE_BYTES.get(chunk.name)
    if limit is None:
        return 0
    data = files.setdefault(chunk.name, bytearray())
    data += chunk.data
    if len(data) > limit:
        text = f"{address}: {chunk.name} has more than {limit} bytes"
        raise errors.ShardFault(text, field=chunk.name, limit=limit, value=len(data), addresses=[address])
    return len(chunk.data)
