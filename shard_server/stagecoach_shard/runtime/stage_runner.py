"""Runs micro-batches on one compute thread, first in, first out. Knows no gRPC."""

from __future__ import annotations

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
from stagecoach_shard.runtime.load_meter import Load, LoadMeter, StepTimes
from stagecoach_shard.runtime.outputs import Output, WantedOutput, compute_outputs
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.transfers import for_device, to_host

logger = logging.getLogger(__name__)

_THREAD_NAME = "compute"


@dataclass(frozen=True, slots=True)
class StageInput:
    """One micro-batch, as the compute thread needs it."""

    inputs: Tensor  # int32 [num_tokens] on the first stage, else [num_tokens, hidden_size]; on the CPU
    batch: Batch
    outputs: Sequence[WantedOutput]
    is_current: Callable[[], bool]  # asked just before the run: whether its lease still stands
    load: Load = field(default_factory=Load)  # of its lease


# Hidden states for the next stage ([num_tokens, hidden_size]), or the last stage's outputs; on the CPU.
StageResult = Tensor | list[Output]
OnDone = Callable[[StageResult | Exception | None, StepTimes], None]


def is_computing() -> bool:
    """Whether a compute thread of this process has yet to end."""
    return any(thread.name == _THREAD_NAME for thread in threading.enumerate())


@dataclass(frozen=True, slots=True)
class _Queued:
    """A step that waits for the compute thread."""

    step: StageInput
    on_done: OnDone
    decode_s: float
    submitted_s: float  # when, as `time.perf_counter` tells it


class StageRunner:
    """Owns the compute thread of one stage.

    `submit` may be called from any thread; `on_done` is called on the compute thread with the result or the error, or
    with None where the lease had ended before the run, and with the step's times. Every step that is submitted before
    `stop` is answered.
    """

    def __init__(self, stage: Stage, cache: KVCache, *, num_threads: int) -> None:
        self.stage = stage
        self.cache = cache
        self.meter = LoadMeter()
        self._num_threads = num_threads
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()  # None ends the thread
        self._failure: torch.AcceleratorError | None = None
        self._thread = threading.Thread(target=self._loop, name=_THREAD_NAME, daemon=True)

    @property
    def alive(self) -> bool:
        """Whether a step can still be computed here: the compute thread runs, and its device answers.

        False before `start`, after `stop`, and for good once the device's context is lost. A step that failed by itself
        changes nothing, and one that does not come back is not seen here: its router finds that it is overdue.
        """
        return self._thread.is_alive() and self._failure is None

    def start(self) -> None:
        """Starts the compute thread."""
        self._thread.start()

    def submit(self, step: StageInput, on_done: OnDone, *, decode_s: float = 0.0) -> None:
        """Queues a step. `decode_s`: how long its frame took to read, which is one of its times."""
        self.meter.arrived(step.load, decode_s)
        self._queue.put(_Queued(step, on_done, decode_s, time.perf_counter()))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after what is queued, and waits for that. Returns whether it has ended, if not in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        torch.set_num_threads(self._num_threads)
        self.meter.thread_began()
        while (queued := self._queue.get()) is not None:
            self._run(queued)
        self.meter.thread_ended()

    def _run(self, queued: _Queued) -> None:
        step = queued.step
        queue_s = self.meter.taken(step.load) - queued.submitted_s
        result = self._outcome(step)
        is_computed = result is not None and not isinstance(result, Exception)
        compute_s = self.meter.finished(queue_s=queue_s, num_tokens=step.batch.total_tokens if is_computed else None)
        try:
            queued.on_done(result, StepTimes(queued.decode_s, queue_s, compute_s))
        except Exception:  # whoever asked is gone; the next one may not be
            logger.exception("a step's result could not be given back")

    def _outcome(self, step: StageInput) -> StageResult | Exception | None:
        """What `on_done` is told. A fault is one step's, and its lease's; the thread lives on."""
        if self._failure is not None:
            return self._failure
        try:
            return self._compute(step) if step.is_current() else None
        except torch.AcceleratorError as error:  # the device's context is lost, and with it everything on the device
            logger.critical("the device is lost", exc_info=True)
            self._failure = error
            return error
        except Exception as error:
            logger.exception("step failed")
            return error

    @torch.inference_mode()
    def _compute(self, step: StageInput) -> StageResult:
        stage = self.stage
        hidden_states = stage.forward(for_device(step.inputs, stage.device), step.batch, self.cache)
        if stage.is_last:
            return compute_outputs(stage, hidden_states, step.outputs)
        return to_host([hidden_states])[0]
