"""Runs a target on many inputs, and says of each what is wrong with how it was taken.

An input is taken well when the decoder returns or raises a typed error, within a bound on its own thread's time, on
what Python and numpy allocate at the peak (tracemalloc), and on how far the process grows (for torch, protobuf and
tokenizers, which tracemalloc does not see).
"""

from __future__ import annotations

import base64
import contextlib
import random
import resource
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagecoach.errors import InternalError, StagecoachError
from tests.fuzz.mutation import mutate

_SHOWN_BYTES = 3000


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder. `check` raises a StagecoachError for an input it refuses; anything else that it raises is a find.

    corpus: valid inputs, of which hostile ones are made; words: pieces that mean something to it. share: how many
    inputs it gets of a run over all targets, relative to the others: fewer where one costs more.
    """

    name: str
    corpus: Sequence[bytes]
    check: Callable[[bytes], object]
    words: Sequence[bytes] = ()
    share: int = 10
    max_input_bytes: int = 1 << 16
    max_s: float = 1.0
    max_allocated_bytes: int = 32 << 20
    max_growth_bytes: int = 256 << 20

    def input(self, seed: int, index: int) -> bytes:
        """The input of that number: a function of target, seed and number."""
        rng = random.Random(f"{self.name} {seed} {index}")
        return mutate(rng, self.corpus, self.words, self.max_input_bytes)


@dataclass(slots=True)
class Report:
    """How a run over one target went."""

    name: str
    num_inputs: int = 0
    num_accepted: int = 0
    elapsed_s: float = 0.0
    slowest_s: float = 0.0
    allocated_bytes: int = 0  # the most that one input had at a time
    growth_bytes: int = 0  # of the process, from the first input to the last

    @property
    def inputs_per_s(self) -> float:
        return self.num_inputs / self.elapsed_s if self.elapsed_s else 0.0


class Find(Exception):
    """An input that was not taken well, with what to type to see it again."""

    def __init__(self, target: Target, seed: int, index: int, data: bytes, reason: str) -> None:
        shown = base64.b64encode(data[:_SHOWN_BYTES]).decode()
        super().__init__(
            f"{target.name}: {reason}\n"
            f"  again: python -m tests.fuzz --target {target.name} --seed {seed} --only {index}\n"
            f"  input, {len(data)} bytes{', cut' if len(data) > _SHOWN_BYTES else ''}, base64: {shown}"
        )
        self.reason = reason


def fuzz(target: Target, seed: int, indices: Sequence[int]) -> Report:
    """Gives the target its inputs of these numbers. Raises Find for the first that is not taken well."""
    report = Report(target.name)
    traced_before = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        _warm_up(target)
        first_size = size = _process_bytes()
        begin = time.perf_counter()
        for index in indices:
            data = target.input(seed, index)
            reason, size = _take(target, data, size, report)
            if reason:
                raise Find(target, seed, index, data, reason)
        report.elapsed_s = time.perf_counter() - begin
        report.growth_bytes = size - first_size
    finally:
        if not traced_before:
            tracemalloc.stop()
    return report


def _warm_up(target: Target) -> None:
    """What is allocated once, such as a library's tables, is nobody's fault."""
    for data in target.corpus:
        with contextlib.suppress(Exception):  # the run will tell
            target.check(data)


def _take(target: Target, data: bytes, size: int, report: Report) -> tuple[str, int]:
    """What is wrong with how the input was taken, "" for nothing; and the process's size afterwards."""
    tracemalloc.reset_peak()
    allocated = tracemalloc.get_traced_memory()[0]
    begin = time.thread_time()
    reason = ""
    try:
        target.check(data)
        report.num_accepted += 1
    except InternalError as error:
        reason = f"it raised {error!r}"
    except StagecoachError:
        pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library written in Rust is no Exception
        reason = f"it raised {type(error).__name__}: {str(error)[:500]}"
    elapsed_s = time.thread_time() - begin
    allocated = tracemalloc.get_traced_memory()[1] - allocated
    new_size = _process_bytes()
    report.num_inputs += 1
    report.slowest_s = max(report.slowest_s, elapsed_s)
    report.allocated_bytes = max(report.allocated_bytes, allocated)
    if elapsed_s > target.max_s:
        reason = reason or f"it took {elapsed_s:.2f} s of {target.max_s:g}"
    if allocated > target.max_allocated_bytes:
        reason = reason or f"it allocated {allocated:,} bytes of {target.max_allocated_bytes:,}"
    if new_size - size > target.max_growth_bytes:
        reason = reason or f"the process grew by {new_size - size:,} bytes of {target.max_growth_bytes:,}"
    return reason, new_size


def _process_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
