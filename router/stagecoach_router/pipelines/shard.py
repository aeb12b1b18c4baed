"""What the router knows of one shard: its address, and the process that answers there. Pure.

An address is a place where one process follows another. So whatever counts against a process, that it broke a pipeline
or could not load layers, is kept with that process and ends with it: the next one at the address begins anew. Who it
is, a process says itself, and it may say another name each time. So too much within a short time counts against the
address, whoever answers there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from stagecoach.errors import ShardFault, StagecoachError, Unavailable
from stagecoach.topology import LayerRange
from stagecoach_router.pipelines.placement import Candidate
from stagecoach_router.pipelines.shard_description import ShardDescription

# After a load that failed, the process is not told to load again for so long; the shorter one where that need not have
# been its own doing.
LOAD_RETRY_S = 30.0
BROKEN_LOAD_RETRY_S = 1.0
# One that says for longer than this that it is loading is not counted on, if there are others.
LOAD_PATIENCE_S = 60.0
# A process that may have broken a pipeline is second choice for so long. So is whoever answers at an address where this
# has happened so often within that time.
QUARANTINE_S = 60.0
MAX_LOSSES = 3
# At one address so many loads may begin within so long, on the average.
MAX_LOADS = 3
LOADS_WINDOW_S = 3.0


@dataclass(eq=False, slots=True)
class ProcessRecord:
    """What counts against one process. Times are time.monotonic()'s."""

    process_id: str = ""  # "": it has not answered yet
    load_error: StagecoachError | None = None  # why it could not load layers
    no_load_before_s: float = 0.0
    quarantined_until_s: float = 0.0
    loaded: LayerRange | None = None  # what it says it has loaded just now, and has not described itself with yet

    def could_not_load(self, error: StagecoachError) -> None:
        """It was told to load layers, and that ended with `error`."""
        if isinstance(error, Unavailable):  # it died, or stops, or the link broke, or another router was first
            self.no_load_before_s = time.monotonic() + BROKEN_LOAD_RETRY_S
        else:
            self.no_load_before_s = time.monotonic() + LOAD_RETRY_S
            self.load_error = error

    def describes(self, description: ShardDescription) -> None:
        """It has said what it is: that has to be what it has loaded, unless another router had it load since."""
        loaded, self.loaded = self.loaded, None
        if loaded is None or description.layers == loaded:
            return
        text = f"{description.address} said that it has loaded layers {loaded}, and has {description.layers or 'none'}"
        kind = ShardFault if description.layers is None else Unavailable
        self.could_not_load(kind(text, field="layers", limit=loaded, addresses=[description.address]))

    def quarantine(self) -> None:
        """A pipeline was lost that it may have broken."""
        self.quarantined_until_s = time.monotonic() + QUARANTINE_S


@dataclass(eq=False, slots=True)
class Shard:
    """What the router knows of one shard. While it is in a pipeline, that pipeline knows how it is."""

    address: str
    epoch: int | None = None  # of the pipeline that it is in; None: in none
    description: ShardDescription | None = None  # its last answer; None: none, or none since it was in a pipeline
    error: StagecoachError | None = None  # why it did not answer, or not as a shard can
    left_out: StagecoachError | None = None  # why what it described can be in no pipeline of the router's model
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # to ask it at once
    process: ProcessRecord = field(default_factory=ProcessRecord)  # the one that answered last
    loading: LayerRange | None = None  # what that was told to load, and has not loaded yet
    loading_since_s: float = 0.0
    lost_at_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_LOSSES))  # pipelines, by whichever process
    told_at_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_LOADS))  # to load layers

    @property
    def reason(self) -> str:
        """Why it cannot take part, beginning with its address; "" where it can."""
        if self.loading is not None:
            return f"{self.address}: loading layers {self.loading}"
        if self.error is not None:
            return str(self.error)
        if self.left_out is not None:
            return str(self.left_out)
        if self.process.load_error is not None:
            return f"{self.process.load_error}; it could not load layers"
        return "" if self.description is not None else f"{self.address}: it has not answered yet"

    @property
    def was_asked(self) -> bool:
        """Whether it has been asked who it is since it was last in a pipeline, though it need not have answered."""
        return self.description is not None or self.error is not None

    @property
    def layers(self) -> LayerRange | None:
        """The layers that it has now; None: it has none, or they are not known."""
        return None if self.description is None else self.description.layers

    @property
    def assignable(self) -> bool:
        """Whether it is known that it may be given other layers."""
        return self.description is not None and self.description.facts.assignable

    @property
    def has_own_layers(self) -> bool:
        """Whether it is known that it was started with a layer range of its own."""
        return self.layers is not None and not self.assignable

    @property
    def is_quarantined(self) -> bool:
        """Whether a pipeline was lost lately that the process that answers now was in, and may have broken."""
        return self.description is not None and time.monotonic() < self.process.quarantined_until_s

    @property
    def candidate(self) -> Candidate | None:
        """What a pipeline could make of it; None while it is in one, does not answer or does not fit."""
        if self.epoch is not None:
            return None
        if self.loading is not None:
            # One that loads says so when asked. One that does not answer at all is not waited for.
            is_silent = self.error is not None and self.error.field != "layers"
            takes_too_long = time.monotonic() - self.loading_since_s >= LOAD_PATIENCE_S
            if is_silent or takes_too_long:
                return None
            return Candidate(self.address, self.loading, False, 0, is_loading=True)
        if self.description is None or self.error is not None or self.left_out is not None:
            return None
        may_load = self.assignable and time.monotonic() >= self._no_load_before_s
        num_blocks = self.description.facts.num_free_blocks
        return Candidate(self.address, self.layers, may_load, num_blocks, self.is_quarantined)

    def learn(self, description: ShardDescription | None, error: StagecoachError | None = None) -> None:
        """It has been asked who it is."""
        if description is not None and description.process_id != self.process.process_id:
            self.process = ProcessRecord(description.process_id, quarantined_until_s=self._quarantined_until_s)
            self.loading = None  # which the process before had been told
        if description is not None:
            self.process.describes(description)
        self.description, self.error = description, error

    def quarantine(self) -> None:
        """A pipeline was lost that the process which answered last may have broken."""
        self.process.quarantine()
        self.lost_at_s.append(time.monotonic())

    @property
    def _quarantined_until_s(self) -> float:
        """Until when a new process here is in quarantine from the beginning; 0.0: it is not."""
        if len(self.lost_at_s) < MAX_LOSSES or self.lost_at_s[-1] - self.lost_at_s[0] > QUARANTINE_S:
            return 0.0
        return self.lost_at_s[-1] + QUARANTINE_S

    @property
    def _no_load_before_s(self) -> float:
        address_s = self.told_at_s[0] + LOADS_WINDOW_S if len(self.told_at_s) == MAX_LOADS else 0.0
        return max(self.process.no_load_before_s, address_s)

    def begin_load(self, layers: LayerRange) -> ProcessRecord:
        """The process that answered last is told to load these; returns its record."""
        self.loading, self.loading_since_s = layers, time.monotonic()
        self.told_at_s.append(self.loading_since_s)
        self.process.load_error = None
        return self.process
