"""The router's side of the process that renders chat templates: starts it, asks it, and ends it when it runs over."""

from __future__ import annotations

import asyncio
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagecoach.errors import InvalidArgument, Unavailable
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text import template_worker
from stagecoach_router.text.serial_queue import SerialQueue
from stagecoach_router.text.template_worker import ANSWER_HEAD, OUT_OF_MEMORY_STATUS, REQUEST_HEAD, Outcome

# Of our environment, what says where libraries are and what time it is. Nothing else: keys may be in it.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ")

# Of a text that is rendered, those that are charged as one token.
CHARACTERS_PER_TOKEN = 8
# Until another router, or this one when it is back, takes the request.
STOPPING_RETRY_AFTER_S = 1.0
# How often a rendering is begun whose worker dies, or is not heard of, for no fault of the messages.
MAX_ATTEMPTS = 2
# Of what it may compute, what a worker must have computed that runs out of time, or it was the machine that did: it
# stood still, or had no processor to spare.
MIN_CPU_SHARE = 0.25
# For a process whose connection has ended: how it ends.
_END_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What rendering may take."""

    max_output_length: int = 16 << 20  # characters
    max_memory_bytes: int = 512 << 20  # of address space, of which Python and jinja take some 30 MiB
    max_cpu_s: int = 5  # the kernel counts whole seconds
    max_wall_s: float = 10.0  # from asking to the whole answer; more than CPU time, as other processes want the CPU


def tokens_for_rendering(num_characters: int) -> int:
    """What rendering so much is charged as: fewer tokens than a text of that length has, as a rule."""
    return num_characters // CHARACTERS_PER_TOKEN


class TemplateProcess:
    """A worker that renders one template at a time, started when there is something to render.

    A rendering that passes a limit fails alone: its worker is ended, and the next rendering gets a new one.
    """

    def __init__(self, limits: RenderLimits = RenderLimits(), queue: SerialQueue | None = None) -> None:
        self._limits = limits
        self._queue = queue or SerialQueue("to be rendered")
        self._worker: _Worker | None = None
        self._closed = False

    @property
    def limits(self) -> RenderLimits:
        return self._limits

    async def render(
        self, source: str, variables: Mapping[str, Any], num_characters: int, caller: Caller
    ) -> tuple[Outcome, str]:
        """What the worker answers. `num_characters` is about what there is to render.

        The caller is charged for what the worker did, also where that led to nothing. Raises
        InvalidArgument(field="messages") past a limit, Overloaded where too much waits, RateLimited for a caller that
        has no tokens left, and Unavailable, uncharged, where no worker can be started or kept, or after `close`.
        """

        def charge(job: asyncio.Task[tuple[Outcome, str]]) -> None:
            if job.cancelled() or isinstance(job.exception(), Unavailable):
                return
            num_written = len(job.result()[1]) if job.exception() is None else 0
            num_tokens = tokens_for_rendering(max(num_characters, num_written))
            caller.tenant.charge(num_tokens, time.monotonic())

        def start() -> asyncio.Task[tuple[Outcome, str]]:
            self._check_open()
            caller.tenant.check_tokens(time.monotonic())
            job = asyncio.create_task(self._ask(source, variables))
            job.add_done_callback(charge)
            return job

        return await self._queue.run(caller.name, num_characters, start)

    async def close(self) -> None:
        """Ends the worker, for good: what is being rendered, or asked for later, fails with Unavailable."""
        self._closed = True
        await self._end_worker()

    async def _ask(self, source: str, variables: Mapping[str, Any]) -> tuple[Outcome, str]:
        request = await asyncio.to_thread(marshal.dumps, {"source": source, "variables": variables})
        failure: Exception | None = None
        for _ in range(MAX_ATTEMPTS):
            self._check_open()
            worker = await self._live_worker()
            try:
                async with asyncio.timeout(self._limits.max_wall_s):
                    return await worker.ask(request, max_bytes=4 * self._limits.max_output_length)
            except (TimeoutError, EOFError, OSError, ValueError) as error:
                self._check_open()
                failure = error
                overran = await worker.has_overrun(error, self._limits)
                await self._end_worker()
                if overran:
                    raise InvalidArgument(
                        "the chat template takes more time or memory for these messages than it may", field="messages"
                    ) from error
            except BaseException:
                await self._end_worker()  # an answer may be under way that nobody reads
                raise
        raise Unavailable(f"the process that renders chat templates does not last: {failure!r}") from failure

    async def _live_worker(self) -> _Worker:
        if self._worker is None or self._worker.has_ended:
            await self._end_worker()
            self._worker = await _Worker.start(self._limits)
        return self._worker

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the router is stopping", retry_after_s=STOPPING_RETRY_AFTER_S)

    async def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()


class _Worker:
    """One process. Its standard input and output are the one connection to us, and nothing else is open in it."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._cpu_before_s = 0.0  # what it had computed when it was asked

    @classmethod
    async def start(cls, limits: RenderLimits) -> _Worker:
        """Raises Unavailable where the system does not let us start one."""
        try:
            process, connection = _start_process(limits)
            try:
                reader, writer = await asyncio.open_unix_connection(sock=connection)
            except BaseException:
                process.kill()
                connection.close()
                raise
        except OSError as error:
            raise Unavailable(f"the process that renders chat templates cannot be started: {error}") from error
        return cls(process, reader, writer)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    async def ask(self, request: bytes, max_bytes: int) -> tuple[Outcome, str]:
        """The answer, its text of at most `max_bytes`.

        Raises EOFError or OSError where the process ends before it has answered, and ValueError for what is no answer.
        """
        self._cpu_before_s = self._cpu_s()
        self._writer.write(REQUEST_HEAD.pack(len(request)))
        self._writer.write(request)
        await self._writer.drain()
        outcome, num_bytes = ANSWER_HEAD.unpack(await self._reader.readexactly(ANSWER_HEAD.size))
        if num_bytes > max_bytes:
            raise ValueError(num_bytes)
        text = await self._reader.readexactly(num_bytes)
        return Outcome(outcome), text.decode("utf-8", "surrogatepass")

    async def has_overrun(self, error: Exception, limits: RenderLimits) -> bool:
        """Whether what `ask` raised is the fault of what it was asked, and not of whoever killed or stopped it."""
        if isinstance(error, TimeoutError):
            may_s = min(limits.max_cpu_s, limits.max_wall_s)
            return self._cpu_s() - self._cpu_before_s >= MIN_CPU_SHARE * may_s
        if isinstance(error, ValueError):
            return True
        try:
            status = await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return False
        return status in (-signal.SIGXCPU, OUT_OF_MEMORY_STATUS)

    def _cpu_s(self) -> float:
        """What it has computed, in seconds of CPU time; 0 of one that is gone."""
        try:
            with open(f"/proc/{self._process.pid}/stat", encoding="latin-1") as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
        except OSError:
            return 0.0
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def close(self) -> None:
        self._process.kill()
        self._writer.close()
        await asyncio.to_thread(self._process.wait)


def _start_process(limits: RenderLimits) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of the connection to it."""
    numbers = (limits.max_memory_bytes, limits.max_cpu_s, limits.max_output_length)
    command = [sys.executable, "-P", "-m", template_worker.__name__, *map(str, numbers)]
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            # Not asyncio's own way: under uvloop, that leaves other sockets open in the child.
            return subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment), ours
        except OSError:
            ours.close()
            raise
