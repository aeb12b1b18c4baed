"""One token through a whole pipeline that nobody else uses at the moment: the proof that it can generate. Pure.

A probe has a slot and a block of its own, which no request ever gets, so it cannot fail for want of either; and it is
in nobody's way, since it goes only when no step is in flight. It is a sequence like any other to the shards and to the
sampler, but not to the scheduler nor to any count of requests.
"""

from __future__ import annotations

from stagecoach.errors import ShardFault
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.engine.wire import GroupOutputs
from stagecoach_router.sampling.outputs import InsufficientCandidates, wanted_output
from stagecoach_router.sampling.sampler import choose_tokens
from stagecoach_router.scheduling.plan import BlockTableUpdate, Plan, Row
from stagecoach_router.scheduling.sequence import Sequence

SEQ_ID = 0  # requests' begin at 1
# A slow machine is kept busy by probes for no more than this part of its idle time.
MAX_LOAD = 0.05


class HealthProbe:
    """When one is due, what it asks for, and whether what came is a token.

    `interval_s`: after so long without a token, one goes. `slot`: that of no request.
    """

    def __init__(self, interval_s: float, *, slot: int, vocab_size: int) -> None:
        self.interval_s = interval_s
        self._slot = slot
        params = SamplingParams(temperature=0.0)
        want = wanted_output(params, vocab_size)
        self._sequence = Sequence(seq_id=SEQ_ID, prompt_tokens=(0,), params=params, seed=0, want=want)
        self._last_token_s: float | None = None
        self.expected_s: float | None = None  # that one takes: as long as the last one

    def forget(self) -> None:
        """The pipeline is a new one: nothing has come through it yet."""
        self._last_token_s = self.expected_s = None

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to prove again that tokens come through."""
        if self._last_token_s is None:
            return True
        return now_s - self._last_token_s >= max(self.interval_s, (self.expected_s or 0.0) / MAX_LOAD)

    def token_came(self, now_s: float) -> None:
        """A request's token: a proof as good as any."""
        self._last_token_s = now_s

    def plan(self, block_id: int) -> Plan:
        """The step that asks for the probe's token, with its K/V in `block_id`."""
        row = Row(self._sequence, self._slot, 0, 1, True, self._sequence.incarnation)
        return Plan((row,), (BlockTableUpdate(self._slot, 0, (block_id,)),), 1)

    def take(self, outputs: list[GroupOutputs], now_s: float, took_s: float) -> None:
        """The probe's step is back. Raises ShardFault where no token can be chosen from what came."""
        [(_, group)] = outputs
        [choice] = choose_tokens(group, [self._sequence])
        if isinstance(choice, InsufficientCandidates):
            choice = ShardFault("the likeliest token cannot be told from the candidates that came")
        if isinstance(choice, ShardFault):
            raise choice
        self._last_token_s, self.expected_s = now_s, took_s
