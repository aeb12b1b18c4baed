"""A shard that computes nothing and answers at once: what is then measured is the router.

It speaks the whole contract of a one-stage pipeline (Describe, FetchFiles, Session, Forward, real frames, credits, load
reports) for a checkpoint's shape and tokenizer. Candidates are random tokens with falling logits and a log-sum-exp that
fits them, whole rows are random logits; both are drawn once, so that an answer costs this process next to nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from stagecoach import PROTOCOL_VERSION, __version__
from stagecoach.errors import ConfigError
from stagecoach.process import lifecycle
from stagecoach.process.listener import listen
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.framing import read_frame, write_frame
from stagecoach.rpc.shard_rpc import shard_handlers
from stagecoach.v1 import model_pb2, shard_pb2

Context = grpc.aio.ServicerContext[Any, Any]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)
FILE_CHUNK_BYTES = 1 << 20
BLOCK_SIZE = 16
MAX_BATCH_TOKENS = 8192
MAX_QUEUED_STEPS = 64
LOAD_REPORT_INTERVAL_S = 1.0
# Rows that were drawn beforehand; answers begin at changing ones.
NUM_DRAWN_ROWS = 4096
NUM_DRAWN_WHOLE_ROWS = 8


class Answers:
    """Random outputs of any number of rows, cut from what was drawn once."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._dice = np.random.default_rng(0)
        self._candidates: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}
        self._whole = self._dice.normal(0.0, 3.0, (NUM_DRAWN_WHOLE_ROWS, vocab_size)).astype("<f4")
        self._turn = 0

    def of_group(self, group: shard_pb2.OutputGroup) -> tuple[shard_pb2.OutputBlock, list[memoryview]]:
        """The block that answers `group`, and its arrays."""
        num_rows, k = len(group.token_indices), min(group.num_candidates, self._vocab_size)
        self._turn += 1
        if not k:
            rows = np.take(self._whole, range(self._turn, self._turn + num_rows), axis=0, mode="wrap")
            block = shard_pb2.OutputBlock(
                num_rows=num_rows, num_columns=self._vocab_size, dtype=model_pb2.DTYPE_FLOAT32
            )
            return block, [rows.data.cast("B")]
        ids, logits, log_sum_exp = self._drawn(k)
        start = self._turn * 521 % (NUM_DRAWN_ROWS - num_rows + 1)
        part = slice(start, start + num_rows)
        arrays = [ids[part], logits[part]]
        if group.log_sum_exp:
            # Of the row divided by its temperature: what is not among the candidates is taken to weigh nothing.
            scaled = logits[part] / np.maximum(np.array(group.temperatures, dtype="<f4"), 1e-3)[:, None]
            arrays += [log_sum_exp[part], _log_sum_exp(scaled)]
        block = shard_pb2.OutputBlock(
            num_rows=num_rows,
            num_columns=k,
            candidates=True,
            log_sum_exp=group.log_sum_exp,
            dtype=model_pb2.DTYPE_FLOAT32,
        )
        return block, [array.data.cast("B") for array in arrays]

    def _drawn(self, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if k not in self._candidates:
            first = self._dice.integers(0, self._vocab_size, (NUM_DRAWN_ROWS, 1))
            ids = ((first + np.arange(k) * (self._vocab_size // k)) % self._vocab_size).astype("<i4")
            logits = -np.sort(-self._dice.normal(0.0, 3.0, (NUM_DRAWN_ROWS, k)), axis=1).astype("<f4")
            self._candidates[k] = ids, logits, _log_sum_exp(logits)
        return self._candidates[k]


def _log_sum_exp(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[n, k] falling -> [n]."""
    peak = logits[:, :1].astype(np.float64)
    sums: npt.NDArray[np.float32] = (np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]).astype("<f4")
    return sums


class StubShard:
    """Serves one lease at a time."""

    def __init__(self, model: Path, num_blocks: int) -> None:
        try:
            self._config = json.loads((model / "config.json").read_text())
            self._files = {name: (model / name).read_bytes() for name in TOKENIZER_FILES if (model / name).is_file()}
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: {error}", field="model", value=model) from error
        self._name = model.name
        self._num_blocks = num_blocks
        self._answers = Answers(self._config["vocab_size"])
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._load = shard_pb2.LoadReport()

    async def describe(self, request: shard_pb2.DescribeRequest, context: Context) -> shard_pb2.DescribeResponse:
        config = self._config
        return shard_pb2.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            shard_id="stub",
            model=model_pb2.ModelDescription(
                name=self._name,
                family=config["model_type"],
                fingerprint="stub",
                num_layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                vocab_size=config["vocab_size"],
                context_length=config["max_position_embeddings"],
            ),
            layers=model_pb2.LayerRange(start=0, end=config["num_hidden_layers"]),
            dtype=model_pb2.DTYPE_BFLOAT16,
            device="stub",
            block_size=BLOCK_SIZE,
            num_blocks=self._num_blocks,
            num_free_blocks=self._num_blocks,
            max_batch_tokens=MAX_BATCH_TOKENS,
            pid=os.getpid(),
            hostname=socket.gethostname(),
        )

    async def assign(self, request: shard_pb2.AssignRequest, context: Context) -> shard_pb2.AssignResponse:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it has all layers, and takes no others")

    async def fetch_files(
        self, request: shard_pb2.FetchFilesRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FileChunk]:
        for name, data in self._files.items():
            for start in range(0, max(len(data), 1), FILE_CHUNK_BYTES):
                yield shard_pb2.FileChunk(name=name, data=data[start : start + FILE_CHUNK_BYTES])

    async def session(self, _: object, context: Context) -> None:
        await context.read()
        outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._outbox = outbox
        self._load.lease_num_steps = 0
        await context.write(write_frame(shard_pb2.SessionResponse(opened=shard_pb2.OpenResponse())))
        tasks = [asyncio.create_task(self._watch(context, outbox)), asyncio.create_task(self._report_load(outbox))]
        try:
            while (frame := await outbox.get()) is not None:
                await context.write(frame)
        finally:
            for task in tasks:
                task.cancel()

    async def forward(self, _: object, context: Context) -> None:
        await context.write(shard_pb2.ForwardResponse(credits=MAX_QUEUED_STEPS))
        while isinstance(data := await context.read(), bytes):
            message, payload = read_frame(shard_pb2.MicroBatch, data)
            self._outbox.put_nowait(self._answer(message.header))
            self._load.num_steps += 1
            self._load.lease_num_steps += 1
            self._load.num_tokens += len(payload) // 4
            await context.write(shard_pb2.ForwardResponse(credits=1))

    def _answer(self, header: shard_pb2.MicroBatchHeader) -> bytes:
        result = shard_pb2.StepResult(epoch=header.epoch, step=header.step, timings=[shard_pb2.StageTiming()])
        payload: list[memoryview] = []
        for group in header.outputs:
            block, arrays = self._answers.of_group(group)
            result.outputs.append(block)
            payload += arrays
        return write_frame(shard_pb2.SessionResponse(result=result), payload)

    async def _watch(self, context: Context, outbox: asyncio.Queue[bytes | None]) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            if request.WhichOneof("kind") == "report_load":
                answer = shard_pb2.LoadReport()
                answer.CopyFrom(self._load)
                answer.number = request.report_load.number
                outbox.put_nowait(write_frame(shard_pb2.SessionResponse(load=answer)))
        outbox.put_nowait(None)

    async def _report_load(self, outbox: asyncio.Queue[bytes | None]) -> None:
        while True:
            outbox.put_nowait(write_frame(shard_pb2.SessionResponse(load=self._load)))
            await asyncio.sleep(LOAD_REPORT_INTERVAL_S)


async def serve(model: Path, address: str, num_blocks: int, stop: asyncio.Event) -> None:
    """Serves until `stop`. Raises ConfigError for a folder without a configuration."""
    stub = StubShard(model, num_blocks)
    server, _ = listen(MAX_SHARD_MESSAGE_BYTES, address)
    handlers = shard_handlers(
        describe=stub.describe,
        assign=stub.assign,
        fetch_files=stub.fetch_files,
        session=stub.session,
        forward=stub.forward,
    )
    server.add_generic_rpc_handlers((handlers,))
    await server.start()
    await stop.wait()
    await server.stop(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder; its weights are not read")
    parser.add_argument("--listen", default="127.0.0.1:50051")
    parser.add_argument("--num-blocks", type=int, default=1 << 17, help="K/V blocks of 16 positions to claim")
    arguments = parser.parse_args()
    sys.exit(
        lifecycle.run("stub_shard", lambda stop: serve(arguments.model, arguments.listen, arguments.num_blocks, stop))
    )


if __name__ == "__main__":
    main()
