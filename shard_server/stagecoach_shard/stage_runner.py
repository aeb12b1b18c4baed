"""Runs micro-batches on one compute thread, first in, first out, and counts where its time goes. Knows no gRPC."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stagecoach_shard.batch import Batch
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.lease import Rows
from stagecoach_shard.reduction import log_sum_exp, top_candidates
from stagecoach_shard.stage import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """Logits that somebody asked for: see OutputGroup in the contract."""

    token_indices: Tensor  # int64 [n], into the micro-batch's tokens
    num_candidates: int
    temperatures: Tensor | None  # float32 [n] where the log-sum-exp is wanted


@dataclass(frozen=True, slots=True)
class StageInput:
    """One micro-batch, as a stage needs it."""

    inputs: Tensor  # int32 [num_tokens] on the first stage, else [num_tokens, hidden_size]; on the CPU
    rows: Rows
    outputs: Sequence[WantedOutput]
    is_current: Callable[[], bool]  # asked just before the run: whether its lease still stands


@dataclass(frozen=True, slots=True)
class Output:
    """What one WantedOutput came to: whole rows, or candidates with the two log-sum-exps. On the CPU."""

    arrays: tuple[Tensor, ...]
    num_rows: int
    num_columns: int
    candidates: bool
    log_sum_exp: bool


# Hidden states for the next stage ([num_tokens, hidden_size]), or the last stage's outputs.
StageResult = Tensor | list[Output]


@dataclass(slots=True)
class Load:
    """What the compute thread did since it started. Steps are those that were computed to their end."""

    num_steps: int = 0
    num_tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    idle_since: float | None = field(default=None, repr=False)


class StageRunner:
    """Owns the compute thread of one stage.

    `submit` may be called from any thread; `on_done` is called on the compute thread with the result or the error,
    or with None where the lease had ended before the run. Every step that is submitted before `stop` is answered.
    """

    def __init__(self, stage: Stage, cache: KVCache, *, block_size: int, num_threads: int) -> None:
        self.stage = stage
        self.load = Load()
        self._cache = cache
        self._block_size = block_size
        self._num_threads = num_threads
        self._queue: queue.SimpleQueue[tuple[StageInput, Callable[[StageResult | Exception | None], None]] | None] = (
            queue.SimpleQueue()
        )
        self._busy_since: float | None = None
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

    def start(self) -> None:
        self._thread.start()

    def submit(self, step: StageInput, on_done: Callable[[StageResult | Exception | None], None]) -> None:
        self._queue.put((step, on_done))

    def stop(self) -> None:
        """Ends the thread after what is queued."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        torch.set_num_threads(self._num_threads)
        load = self.load
        while True:
            begin = time.perf_counter()
            load.idle_since = begin
            work = self._queue.get()
            start = time.perf_counter()
            load.idle_since = None
            load.wait_s += start - begin
            if work is None:
                return
            step, on_done = work
            self._busy_since = start
            result = self._outcome(step)
            self._busy_since = None
            load.compute_s += time.perf_counter() - start
            try:
                on_done(result)
            except Exception:  # whoever asked is gone; the next one may not be
                logger.exception("a step's result could not be given back")

    def _outcome(self, step: StageInput) -> StageResult | Exception | None:
        """What `on_done` is told. A fault is one step's, and its lease's; the thread lives on."""
        if self._failure is not None:
            return self._failure
        try:
            if not step.is_current():
                return None
            result = self.run(step)
        except torch.AcceleratorError as error:  # the device's context is lost, and with it everything on the device
            logger.critical("the device is lost", exc_info=True)
            self._failure = error
            return error
        except Exception as error:
            logger.exception("step failed")
            return error
        self.load.num_steps += 1
        self.load.num_tokens += step.rows.total_tokens
        return result

    @torch.inference_mode()
    def run(self, step: StageInput) -> StageResult:
        """Computes one micro-batch."""
        stage = self.stage
        batch = Batch.build(
            starts=step.rows.starts,
            num_tokens=step.rows.num_tokens,
            block_tables=step.rows.block_tables,
            block_size=self._block_size,
            device=stage.device,
        )
        # As they came, on the CPU: token ids are checked there, where that waits for no device.
        hidden_states = stage.forward(step.inputs, batch, self._cache)
        if not stage.is_last:
            return hidden_states.cpu()
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
        return outputs


def _whole_rows(logits: Tensor) -> Output:
    return Output((logits.cpu(),), logits.shape[0], logits.shape[1], candidates=False, log_sum_exp=False)


def _candidates(logits: Tensor, group: WantedOutput) -> Output:
    token_ids, values = top_candidates(logits, group.num_candidates)
    arrays = [token_ids, values]
    if group.temperatures is not None:
        arrays += log_sum_exp(logits, group.temperatures.to(logits.device))
    return Output(
        tuple(array.cpu() for array in arrays),
        num_rows=logits.shape[0],
        num_columns=token_ids.shape[1],
        candidates=True,
        log_sum_exp=group.temperatures is not None,
    )
