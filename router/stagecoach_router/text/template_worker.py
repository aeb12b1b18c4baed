"""The process that renders chat templates, one at a time: `python -m stagecoach_router.text.template_worker LIMITS`.

A template is a program from whoever made the checkpoint, so it runs where the kernel bounds its memory and its time.
What passes a bound ends the process, and its parent starts another one (template_process.py).

It reads requests from standard input and answers each on standard output, until its input ends:

    request   length (4 bytes, big-endian), then in `marshal` {"source": the template, "variables": what it may use}
    answer    an Outcome (1 byte), length (4 bytes), then text in UTF-8

JSON of 4 MiB would take the router 30 ms, in which no stream goes on; marshal takes 1 to 4. It is for bytes that one
trusts, as this process may trust its router. Answers are nothing of the kind: they come from a foreign program.
"""

from __future__ import annotations

import enum
import functools
import marshal
import math
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

import jinja2

from stagecoach_router.text.template_sandbox import chat_environment

REQUEST_HEAD = struct.Struct(">I")
ANSWER_HEAD = struct.Struct(">BI")
# Python and jinja import parts of themselves when they first need them, which they can't when no file may be opened.
_WARM_UP = (
    r"{{ '\n' | wordwrap(1) }}{{ [1] | pprint }}{{ '<b>' | striptags }}{{ strftime_now('%c %Z') }}",
    "{{ nothing.of_it }}",
    "{% if",
)
# The status of a process for whose messages there was too little memory. Python's own errors have 1.
OUT_OF_MEMORY_STATUS = 3
MAX_REASON_LENGTH = 1000  # characters of what a template or jinja says of a failure


class Outcome(enum.IntEnum):
    """What an answer's text is."""

    RENDERED = 0  # the conversation
    REFUSED = 1  # why the template failed on these messages
    TOO_LONG = 2  # nothing: the conversation would be longer than the limit
    UNUSABLE = 3  # why the template cannot be compiled


def main() -> None:
    """LIMITS are three numbers: bytes of address space, seconds of CPU for a request, characters of an answer."""
    max_memory_bytes, max_cpu_s, max_output_length = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all of its processes; the router says when
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a router that is gone needs no answer
    for source in _WARM_UP:
        answer(source, {}, max_output_length)
    for limit, value in (
        (resource.RLIMIT_AS, max_memory_bytes),
        (resource.RLIMIT_CORE, 0),
        # A template that got out of the sandbox opens nothing, writes no file and starts no process (as root it may).
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    while head := sys.stdin.buffer.read(REQUEST_HEAD.size):
        _limit_cpu_time(max_cpu_s)
        request = marshal.loads(sys.stdin.buffer.read(*REQUEST_HEAD.unpack(head)))
        outcome, text = answer(request["source"], request["variables"], max_output_length)
        data = text.encode("utf-8", "surrogatepass")  # a template may write half a character
        sys.stdout.buffer.write(ANSWER_HEAD.pack(outcome, len(data)))
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def answer(source: str, variables: Mapping[str, Any], max_output_length: int) -> tuple[Outcome, str]:
    """The answer to one request. Raises MemoryError where there is too little memory for it."""
    try:
        template = _compiled(source)
    except MemoryError:
        raise
    except Exception as error:  # the compiler of a foreign program: syntax, nesting, or a bug in it
        return Outcome.UNUSABLE, _reason(error)
    try:
        pieces, length = [], 0
        for piece in template.generate(variables):
            length += len(piece)
            if length > max_output_length:
                return Outcome.TOO_LONG, ""
            pieces.append(piece)
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign program may raise
        return Outcome.REFUSED, _reason(error)
    return Outcome.RENDERED, "".join(pieces)


@functools.lru_cache(maxsize=1)
def _compiled(source: str) -> jinja2.Template:
    return chat_environment().from_string(source)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_REASON_LENGTH]


def _limit_cpu_time(max_cpu_s: int) -> None:
    """From now on, so many seconds; the kernel counts from the process's start, and ends it past them."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + max_cpu_s, hard))


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)  # there may be no memory left to say more, nor to end in an orderly way
