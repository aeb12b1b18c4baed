"""Runs micro-batches on one compute thread, first in, first out, and counts where its time goes. Knows no gRPC."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.runtime.reduction import log_sum_exp, top_candidates
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.transfers import for_device, to_host

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """Logits that somebody asked for: see OutputGroup in the contract."""

    token_indices: Tensor  # int64 [n], into the micro-batch's tokens
    num_candidates: int
    temperatures: Tensor | None  # float32 [n] where the log-sum-exp is wanted


@dataclass(slots=True)
class LeaseLoad:
    """What the compute thread did for one lease, up to now, and what it has yet to do. The runner's to write."""

    num_steps: int = 0  # computed to their end
    compute_s: float = 0.0
    queue_depth: int = 0  # micro-batches that have arrived and not begun


@dataclass(frozen=True, slots=True)
class StageInput:
    """One micro-batch, as a stage needs it."""

    inputs: Tensor  # int32 [num_tokens] on the first stage, else [num_tokens, hidden_size]; on the CPU
    batch: Batch
    outputs: Sequence[WantedOutput]
    is_current: Callable[[], bool]  # asked just before the run: whether its lease still stands
    lease_load: LeaseLoad = field(default_factory=LeaseLoad)  # of the lease that it belongs to


@dataclass(frozen=True, slots=True)
class Output:
    """What one WantedOutput came to: whole rows, or candidates with the two log-sum-exps. A result's are on the CPU."""

    arrays: tuple[Tensor, ...]
    num_rows: int
    num_columns: int
    candidates: bool
    log_sum_exp: bool


# Hidden states for the next stage ([num_tokens, hidden_size]), or the last stage's outputs.
StageResult = Tensor | list[Output]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where one step's time went on this side of the queue, in seconds."""

    queue_s: float  # from `submit` until the compute thread took it
    compute_s: float  # from then until its result was there


OnDone = Callable[[StageResult | Exception | None, StepTimes], None]


@dataclass(slots=True)
class Load:
    """What the compute thread did since it started, up to now. Steps are those that were computed to their end."""

    num_steps: int = 0
    num_tokens: int = 0
    compute_s: float = 0.0  # it worked on a step
    wait_s: float = 0.0  # it did not, so together they are the time it has been there
    queue_s: float = 0.0  # summed over all steps: how long each had been submitted before it was taken


class StageRunner:
    """Owns the compute thread of one stage.

    `submit` may be called from any thread; `on_done` is called on the compute thread with the result or the error, or
    with None where the lease had ended before the run, and with the step's times. Every step that is submitted before
    `stop` is answered.
    """

    def __init__(self, stage: Stage, cache: KVCache, *, num_threads: int) -> None:
        self.stage = stage
        self.cache = cache
        self._load = Load()
        # Guards the loads with the two moments, of which one is set while the thread runs: what they say never falls.
        self._lock = threading.Lock()
        self._idle_since: float | None = None
        self._busy_since: float | None = None
        self._in_hand: LeaseLoad | None = None  # whose the step in hand is
        self._num_threads = num_threads
        # With each step, when it was submitted. None ends the thread.
        self._queue: queue.SimpleQueue[tuple[StageInput, OnDone, float] | None] = queue.SimpleQueue()
        self._failure: torch.AcceleratorError | None = None
        self._thread = threading.Thread(target=self._loop, name="compute", daemon=True)

    @property
    def queue_depth(self) -> int:
        """Micro-batches that have arrived and not begun."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Whether a step can still be computed here: the compute thread runs, and its device answers.

        False before `start`, after `stop`, and for good once the device's context is lost. A step that failed by itself
        changes nothing, and one that does not come back is not seen here: its sign is `busy_s`.
        """
        return self._thread.is_alive() and self._failure is None

    @property
    def busy_s(self) -> float:
        """For how long the step in hand has been computed; 0 where there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def load(self) -> Load:
        """A copy as of now: the step in hand, or the time it has been idle, is counted as far as it has come."""
        with self._lock:
            load, busy_since, idle_since = dataclasses.replace(self._load), self._busy_since, self._idle_since
            now = time.perf_counter()
        if busy_since is not None:
            load.compute_s += now - busy_since
        if idle_since is not None:
            load.wait_s += now - idle_since
        return load

    def load_of(self, lease: LeaseLoad) -> LeaseLoad:
        """A copy as of now: if the step in hand is that lease's, it is counted as far as it has come."""
        with self._lock:
            load, is_in_hand, busy_since = dataclasses.replace(lease), self._in_hand is lease, self._busy_since
            now = time.perf_counter()
        if is_in_hand and busy_since is not None:
            load.compute_s += now - busy_since
        return load

    def start(self) -> None:
        self._thread.start()

    def submit(self, step: StageInput, on_done: OnDone) -> None:
        with self._lock:
            step.lease_load.queue_depth += 1
        self._queue.put((step, on_done, time.perf_counter()))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after what is queued, and waits for that. Returns whether it has ended, if not in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        torch.set_num_threads(self._num_threads)
        end = time.perf_counter()
        self._idle_since = end
        while True:
            work = self._queue.get()
            with self._lock:
                start = time.perf_counter()
                self._load.wait_s += start - end
                self._idle_since = None
                if work is not None:
                    self._take(work[0], start)
            if work is None:
                return
            step, on_done, submitted = work
            result = self._outcome(step)
            with self._lock:
                end = time.perf_counter()
                times = StepTimes(queue_s=start - submitted, compute_s=end - start)
                self._count(step, result, times)
                self._busy_since = self._in_hand = None
                self._idle_since = end
            try:
                on_done(result, times)
            except Exception:  # whoever asked is gone; the next one may not be
                logger.exception("a step's result could not be given back")

    def _take(self, step: StageInput, now: float) -> None:
        self._busy_since = now
        self._in_hand = step.lease_load
        step.lease_load.queue_depth -= 1

    def _count(self, step: StageInput, result: StageResult | Exception | None, times: StepTimes) -> None:
        load = self._load
        load.queue_s += times.queue_s
        load.compute_s += times.compute_s
        step.lease_load.compute_s += times.compute_s
        if result is not None and not isinstance(result, Exception):
            step.lease_load.num_steps += 1
            load.num_steps += 1
            load.num_tokens += step.batch.total_tokens

    def _outcome(self, step: StageInput) -> StageResult | Exception | None:
        """What `on_done` is told. A fault is one step's, and its lease's; the thread lives on."""
        if self._failure is not None:
            return self._failure
        try:
            if not step.is_current():
                return None
            return self.run(step)
        except torch.AcceleratorError as error:  # the device's context is lost, and with it everything on the device
            logger.critical("the device is lost", exc_info=True)
            self._failure = error
            return error
        except Exception as error:
            logger.exception("step failed")
            return error

    @torch.inference_mode()
    def run(self, step: StageInput) -> StageResult:
        """Computes one micro-batch."""
        stage = self.stage
        hidden_states = stage.forward(for_device(step.inputs, stage.device), step.batch, self.cache)
        if not stage.is_last:
            return to_host([hidden_states])[0]
        return self._reduce(hidden_states, step.outputs)

    def _reduce(self, hidden_states: Tensor, wanted: Sequence[WantedOutput]) -> list[Output]:
        if not wanted:
            return []
        # One pass through the head for all groups: its weights are the largest matrix of the stage.
        indices = torch.cat([group.token_indices for group in wanted]).to(hidden_states.device)
        logits = self.stage.logits(hidden_states[indices])
        outputs = []
        first = 0
        for group in wanted:
            n = len(group.token_indices)
            rows = logits[first : first + n]
            first += n
            outputs.append(_whole_rows(rows) if group.num_candidates == 0 else _candidates(rows, group))
        return _on_host(outputs)


def _on_host(outputs: list[Output]) -> list[Output]:
    arrays = iter(to_host([array for output in outputs for array in output.arrays]))
    return [
        dataclasses.replace(output, arrays=tuple(itertools.islice(arrays, len(output.arrays)))) for output in outputs
    ]


def _whole_rows(logits: Tensor) -> Output:
    return Output((logits,), logits.shape[0], logits.shape[1], candidates=False, log_sum_exp=False)


def _candidates(logits: Tensor, group: WantedOutput) -> Output:
    token_ids, values = top_candidates(logits, group.num_candidates)
    arrays = [token_ids, values]
    if group.temperatures is not None:
        arrays += log_sum_exp(logits, group.temperatures.to(logits.device))
    return Output(
        tuple(arrays),
        num_rows=logits.shape[0],
        num_columns=token_ids.shape[1],
        candidates=True,
        log_sum_exp=group.temperatures is not None,
    )
