"""Which layers this process serves, and how they change: from none, or from those of a stage, to others.

There is one load at a time. It runs on a thread, so that the event loop stays free, and goes on when those who wait for
it go away. The former stage is let go before the next one is loaded, as there may be no room for both.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import traceback
from collections.abc import Callable

from stagecoach import errors
from stagecoach.topology import LayerRange
from stagecoach_shard.leases.served_stage import ServedStage
from stagecoach_shard.memory import give_back_unused
from stagecoach_shard.runtime.stage_runner import StageRunner

logger = logging.getLogger(__name__)

ALIVE_CHECK_INTERVAL_S = 1.0
STOP_COMPUTING_TIMEOUT_S = 10.0
# When to ask again, for those who ask while layers are loaded.
LOADING_RETRY_AFTER_S = 1.0
# The same while the process stops: another shard may have taken its place.
STOPPING_RETRY_AFTER_S = 1.0

LoadLayers = Callable[[LayerRange], StageRunner]


class Assignment:
    """The stage of this process, and how it gets another one.

    `load` loads a range of layers, on a thread; `serve` makes the served stage of the result. `assignable`: a router
    says which range. `on_ready` is told whether this process is ready: while it loads it is not, and without layers it
    is if it waits for a router to assign some.
    """

    def __init__(
        self,
        load: LoadLayers,
        serve: Callable[[StageRunner], ServedStage],
        *,
        assignable: bool,
        on_ready: Callable[[bool], None],
    ) -> None:
        self.assignable = assignable
        self.stage: ServedStage | None = None
        self._load_layers = load
        self._serve = serve
        self._on_ready = on_ready
        self._loading: LayerRange | None = None
        self._task: asyncio.Task[ServedStage] | None = None
        self._former: StageRunner | None = None  # of the stage before, if its thread has yet to end
        self._is_stopping = False
        self._is_stuck = False

    def served(self) -> ServedStage:
        """The stage. Raises Unavailable while layers are loaded, FailedPrecondition where there are none yet."""
        self.check_not_loading()
        if self.stage is None:
            raise errors.FailedPrecondition("the shard has no layers yet: a router has to assign them", field="layers")
        return self.stage

    @property
    def is_stuck(self) -> bool:
        """Whether a step of a former stage never ended: only the end of the process gets rid of its thread."""
        return self._is_stuck

    def check_available(self) -> None:
        """Raises Unavailable where no lease can be opened: the process is stopping, or it is loading layers."""
        self._check_not_stopping()
        self.check_not_loading()

    def check_not_loading(self) -> None:
        """Raises Unavailable while layers are loaded, and says which."""
        if self._loading is not None:
            raise errors.Unavailable(
                f"the shard is loading layers {self._loading}",
                field="layers",
                value=self._loading,
                retry_after_s=LOADING_RETRY_AFTER_S,
            )

    async def assign(self, layers: LayerRange) -> ServedStage:
        """The stage of `layers`: at once if it is served already, otherwise when it has been loaded.

        A caller that stops waiting does not stop the load. Raises FailedPrecondition where this shard takes no other
        range than its own, or leases are open on other layers; Unavailable while other layers are loaded or the process
        is stopping; and what loading raises, after which there are no layers any more.
        """
        if not self.assignable:
            raise errors.FailedPrecondition(
                "the shard was started with a range of its own: it takes no other", field="layers", value=layers
            )
        self._check_not_stopping()
        if self._task is not None and self._loading == layers:
            return await asyncio.shield(self._task)
        self.check_not_loading()
        if self.stage is not None and self.stage.layers == layers:
            return self.stage
        if self.stage is not None and self.stage.num_leases:
            raise errors.FailedPrecondition(
                f"{self.stage.num_leases} leases are open on layers {self.stage.layers}",
                field="layers",
                limit=self.stage.layers,
                value=layers,
            )
        return await asyncio.shield(self.begin(layers))

    def begin(self, layers: LayerRange) -> asyncio.Task[ServedStage]:
        """Begins to load `layers` in place of those that are served. The task is done when they are, or raises."""
        assert self._loading is None, "one load at a time"
        self._loading = layers
        self._on_ready(False)
        self._task = asyncio.create_task(self._change(layers))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be waiting
        return self._task

    async def loaded(self) -> None:
        """Returns when no load is going on any more, however it ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def computing_ended(self) -> None:
        """Returns when the compute thread has ended, which only a bug or a lost device makes it do, or `is_stuck`."""
        # A thread has no event to wait for.
        while not self._is_stuck and (self.stage is None or self.stage.runner.alive):  # noqa: ASYNC110
            await asyncio.sleep(ALIVE_CHECK_INTERVAL_S)

    def drain(self) -> int:
        """Opens no lease and loads nothing from now on. Returns how many leases are open."""
        self._is_stopping = True
        return 0 if self.stage is None else self.stage.num_leases

    async def leases_ended(self) -> None:
        """Returns when no lease is open."""
        if self.stage is not None:
            await self.stage.leases_ended()

    def end_sessions(self) -> None:
        """Tells every router that this shard stops."""
        if self.stage is not None:
            self.stage.end_sessions()

    async def stop_computing(self) -> bool:
        """Ends the compute thread, for good. Returns whether it has ended in time."""
        if self.stage is not None:
            self._former, self.stage = self.stage.runner, None
        return not self._is_stuck and await self._former_has_ended()

    def _check_not_stopping(self) -> None:
        if self._is_stopping:
            raise errors.Unavailable("the shard is stopping", retry_after_s=STOPPING_RETRY_AFTER_S)

    async def _change(self, layers: LayerRange) -> ServedStage:
        try:
            self.stage = await self._load(layers)
            return self.stage
        finally:
            self._loading = self._task = None
            self._on_ready(not self._is_stuck and (self.assignable or self.stage is not None))

    async def _load(self, layers: LayerRange) -> ServedStage:
        begin = time.monotonic()
        try:
            await self._let_go()
            stage = self._serve(await asyncio.to_thread(self._load_layers, layers))
            logger.info("layers %s loaded in %.1f s", layers, time.monotonic() - begin)
            return stage
        except Exception as error:
            if not isinstance(error, errors.StagecoachError):
                logger.exception("loading layers %s", layers)
            failure = _failure(error, layers)
        await asyncio.to_thread(_give_back_memory)
        raise failure

    async def _let_go(self) -> None:
        """Drops the served stage: waits for its compute thread, then gives its memory back."""
        if self.stage is not None:
            logger.info("layers %s are let go", self.stage.layers)
            self._former, self.stage = self.stage.runner, None
        if not await self._former_has_ended():
            self._is_stuck = self._is_stopping = True
            raise errors.ShardFault(f"a step of other layers has not ended in {STOP_COMPUTING_TIMEOUT_S:g} s")
        await asyncio.to_thread(_give_back_memory)

    async def _former_has_ended(self) -> bool:
        if self._former is not None and await asyncio.to_thread(self._former.stop, STOP_COMPUTING_TIMEOUT_S):
            self._former = None
        return self._former is None


def _give_back_memory() -> None:
    gc.collect()
    give_back_unused()


def _failure(error: Exception, layers: LayerRange) -> errors.StagecoachError:
    """The error to answer with. Frees the tensors that had been loaded, as its traceback's frames still hold them."""
    passed: BaseException | None = error
    while passed is not None:
        traceback.clear_frames(passed.__traceback__)
        passed = passed.__cause__ or passed.__context__
    if isinstance(error, errors.StagecoachError):
        return error
    return errors.FailedPrecondition(
        f"layers {layers} cannot be loaded: {type(error).__name__}: {error}", field="layers", value=layers
    )
