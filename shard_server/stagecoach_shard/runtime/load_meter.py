"""How busy a stage is: counted in this one place, by the compute thread and the event loop, and copied for reports."""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass


@dataclass(slots=True)
class Load:
    """What was done up to now, for one lease or for all of them. Only the meter writes it.

    Steps and tokens are of steps that were computed to their end. The last three fields are kept for the stage only.
    """

    num_steps: int = 0
    num_tokens: int = 0
    queue_depth: int = 0  # micro-batches that have arrived and not begun
    queue_s: float = 0.0  # summed over the steps: how long each had waited before it was taken
    compute_s: float = 0.0  # the compute thread worked on a step
    wait_s: float = 0.0  # the compute thread stood idle: with `compute_s`, all the time that it has been there
    decode_s: float = 0.0  # reading and checking frames, on the event loop
    encode_s: float = 0.0  # writing frames, on the event loop


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where one step's time went in this stage."""

    decode_s: float  # reading and checking its frame
    queue_s: float  # from then until the compute thread took it
    compute_s: float  # from then until its result was there


class LoadMeter:
    """Counts for the stage, and for the lease whose step it is. What is read never falls."""

    def __init__(self) -> None:
        self._total = Load()
        self._lock = threading.Lock()
        self._in_hand: Load | None = None  # of the lease whose step the compute thread works on
        self._since: float | None = None  # when it took that step, or became idle; None: there is no thread

    def read(self, lease: Load) -> tuple[Load, Load]:
        """Copies of the stage's load and of the lease's. The step in hand, or idling, counts as far as it has come."""
        with self._lock:
            total, own = dataclasses.replace(self._total), dataclasses.replace(lease)
            in_hand, since = self._in_hand, self._since
            now = time.perf_counter()
        if since is None:
            return total, own
        if in_hand is None:
            total.wait_s += now - since
        else:
            total.compute_s += now - since
            if in_hand is lease:
                own.compute_s += now - since
        return total, own

    def thread_began(self) -> None:
        """The compute thread is there, and idle."""
        self._since = time.perf_counter()

    def thread_ended(self) -> None:
        """The compute thread is about to end."""
        with self._lock:
            self._wait_until(time.perf_counter())
            self._since = None

    def arrived(self, lease: Load, decode_s: float) -> None:
        """A micro-batch of `lease` is queued; reading its frame took `decode_s`."""
        with self._lock:
            self._total.decode_s += decode_s
            self._total.queue_depth += 1
            lease.queue_depth += 1

    def taken(self, lease: Load) -> float:
        """The compute thread takes a step of `lease`. Returns when, as `time.perf_counter` tells it."""
        with self._lock:
            now = time.perf_counter()
            self._wait_until(now)
            self._in_hand, self._since = lease, now
            self._total.queue_depth -= 1
            lease.queue_depth -= 1
        return now

    def finished(self, *, queue_s: float, num_tokens: int | None) -> float:
        """The step in hand is done. `num_tokens` None: without a result. Returns how long the compute thread had it."""
        with self._lock:
            assert self._in_hand is not None
            assert self._since is not None
            now = time.perf_counter()
            compute_s = now - self._since
            for load in (self._total, self._in_hand):
                load.queue_s += queue_s
                load.compute_s += compute_s
                if num_tokens is not None:
                    load.num_steps += 1
                    load.num_tokens += num_tokens
            self._in_hand, self._since = None, now
        return compute_s

    def encoded(self, seconds: float) -> None:
        """Writing a frame took so long."""
        with self._lock:
            self._total.encode_s += seconds

    def _wait_until(self, now: float) -> None:
        assert self._since is not None
        self._total.wait_s += now - self._since
