"""What the last stage answers with: of the tokens that were asked for, whole rows of logits or their candidates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagecoach_shard.runtime.logit_reduction import log_sum_exp, top_candidates
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.transfers import to_host

# Of logits, as float32, that there are at a time, however many a router asks for: those of a step's every token would
# be gigabytes. A router's own steps are hardly ever cut, and a head that is read for so many rows is bound by the
# arithmetic.
_MAX_LOGITS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """A group of tokens whose logits are asked for: see OutputGroup in the contract."""

    token_indices: Tensor  # int64 [n], into the micro-batch's tokens
    num_candidates: int  # 0: whole rows
    temperatures: Tensor | None  # float32 [n] where the log-sum-exp is wanted

    def cut(self, num_rows: int) -> tuple[WantedOutput, WantedOutput]:
        """The same for the first `num_rows` rows, or all where there are fewer, and for the others."""
        if num_rows >= len(self.token_indices):
            return self, WantedOutput(self.token_indices[:0], self.num_candidates, None)
        parts = (slice(None, num_rows), slice(num_rows, None))
        first, rest = (
            dataclasses.replace(
                self,
                token_indices=self.token_indices[part],
                temperatures=None if self.temperatures is None else self.temperatures[part],
            )
            for part in parts
        )
        return first, rest


@dataclass(frozen=True, slots=True)
class Output:
    """What one WantedOutput came to."""

    logits: Tensor  # [n, vocab_size]; of candidates float32 [n, k]
    token_ids: Tensor | None = None  # int32 [n, k], the candidates'
    log_sum_exps: tuple[Tensor, ...] = ()  # float32 [n] each: as the row is, and at its temperature

    @property
    def arrays(self) -> list[Tensor]:
        """All of them, in the order of OutputBlock in the contract."""
        return [*(() if self.token_ids is None else (self.token_ids,)), self.logits, *self.log_sum_exps]


def compute_outputs(stage: Stage, hidden_states: Tensor, wanted: Sequence[WantedOutput]) -> list[Output]:
    """The last stage's `hidden_states` [num_tokens, hidden_size] -> outputs on the CPU, one for each of `wanted`."""
    max_rows = max(1, _MAX_LOGITS_BYTES // (4 * stage.config.vocab_size))
    parts: list[list[Output]] = [[] for _ in wanted]
    for some in _runs_of_rows(wanted, max_rows):
        # One pass through the head for rows of all groups: its weights are the largest matrix of the stage.
        indices = torch.cat([group.token_indices for _, group in some]).to(hidden_states.device)
        logits = torch.split(stage.logits(hidden_states[indices]), [len(group.token_indices) for _, group in some])
        on_host = _on_host([_reduced(rows, group) for rows, (_, group) in zip(logits, some, strict=True)])
        for (place, _), output in zip(some, on_host, strict=True):
            parts[place].append(output)
    return [_joined(outputs) for outputs in parts]


def _runs_of_rows(wanted: Sequence[WantedOutput], max_rows: int) -> Iterator[list[tuple[int, WantedOutput]]]:
    """`wanted` in order, cut where a run has `max_rows` rows; each part with its group's place in `wanted`."""
    run: list[tuple[int, WantedOutput]] = []
    room = max_rows
    for place, group in enumerate(wanted):
        rest = group
        while len(rest.token_indices):
            part, rest = rest.cut(room)
            run.append((place, part))
            room -= len(part.token_indices)
            if not room:
                yield run
                run, room = [], max_rows
    if run:
        yield run


def _joined(outputs: Sequence[Output]) -> Output:
    """One group's outputs, of all its rows."""
    if len(outputs) == 1:
        return outputs[0]
    arrays = [torch.cat(parts) for parts in zip(*(output.arrays for output in outputs), strict=True)]
    token_ids = None if outputs[0].token_ids is None else arrays.pop(0)
    return Output(arrays[0], token_ids, tuple(arrays[1:]))


def _reduced(logits: Tensor, group: WantedOutput) -> Output:
    """`logits` [n, vocab_size] are the group's."""
    if group.num_candidates == 0:
        return Output(logits)
    token_ids, values = top_candidates(logits, group.num_candidates)
    if group.temperatures is None:
        return Output(values, token_ids)
    return Output(values, token_ids, log_sum_exp(logits, group.temperatures.to(logits.device)))


def _on_host(outputs: list[Output]) -> list[Output]:
    """The same on the CPU, all of them waited for together."""
    arrays = iter(to_host([array for output in outputs for array in output.arrays]))
    on_host = []
    for output in outputs:
        token_ids = None if output.token_ids is None else next(arrays)
        on_host.append(Output(next(arrays), token_ids, tuple(itertools.islice(arrays, len(output.log_sum_exps)))))
    return on_host
