"""What the last stage answers with: of the tokens that were asked for, whole rows of logits or their candidates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagecoach_shard.runtime.logit_reduction import log_sum_exp, top_candidates
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.transfers import to_host


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """A group of tokens whose logits are asked for: see OutputGroup in the contract."""

    token_indices: Tensor  # int64 [n], into the micro-batch's tokens
    num_candidates: int  # 0: whole rows
    temperatures: Tensor | None  # float32 [n] where the log-sum-exp is wanted


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
    if not wanted:
        return []
    # One pass through the head for all groups: its weights are the largest matrix of the stage.
    indices = torch.cat([group.token_indices for group in wanted]).to(hidden_states.device)
    logits = torch.split(stage.logits(hidden_states[indices]), [len(group.token_indices) for group in wanted])
    return _on_host([_reduced(rows, group) for rows, group in zip(logits, wanted, strict=True)])


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
