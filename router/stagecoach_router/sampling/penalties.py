"""Logit bias and penalties: what changes logits before they are compared.

In this order, on a token's logit x, with the token in the output c times:
    bias        x + logit_bias[token]
    repetition  x / r if x > 0 else x * r, for tokens in prompt or output (Keskar et al. 2019; transformers)
    frequency   x - frequency_penalty * c
    presence    x - presence_penalty if c > 0 (these two as in OpenAI's API and vLLM)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from stagecoach.sampling_params import SamplingParams

_Float32s = npt.NDArray[np.float32]
_Float64s = npt.NDArray[np.float64]
_Int64s = npt.NDArray[np.int64]

_FIRST_CAPACITY = 64


class TokenCounts:
    """Which tokens a sequence has, and how often each is in its output.

    It is asked at every token, so it is kept as arrays, which are brought up to date from where they stood. It reads
    the sequence's own lists, of which the output only grows.
    """

    __slots__ = ("_index", "_num_counted", "_num_output", "_output", "_prompt", "_token_ids")

    def __init__(self, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> None:
        self._prompt: Sequence[int] | None = prompt_tokens  # None: it is in the arrays
        self._output = output_tokens
        self._num_counted = 0  # output tokens that are in the arrays
        self._index: dict[int, int] = {}  # token id -> its place in the arrays
        self._token_ids: _Int64s = np.zeros(0, dtype=np.int64)
        self._num_output: _Float64s = np.zeros(0, dtype=np.float64)

    def arrays(self) -> tuple[_Int64s, _Float64s]:
        """Distinct tokens of prompt and output in order of appearance, and how often each is in the output; [m] each.

        Views, good until the next call.
        """
        self._catch_up()
        return self._token_ids[: len(self._index)], self._num_output[: len(self._index)]

    def places(self, token_ids: Iterable[int]) -> _Int64s:
        """Where in `arrays` each of these is; -1 for one that is not."""
        self._catch_up()
        index = self._index
        return np.array([index.get(token_id, -1) for token_id in token_ids], dtype=np.int64)

    def _catch_up(self) -> None:
        index = self._index
        if self._prompt is not None:
            for token_id in self._prompt:
                index.setdefault(token_id, len(index))
            self._prompt = None
            self._token_ids = np.fromiter(index, dtype=np.int64, count=len(index))
            self._num_output = np.zeros(len(index), dtype=np.float64)
        for token_id in self._output[self._num_counted :]:
            place = index.setdefault(token_id, len(index))
            if place == len(self._token_ids):
                room = max(place, _FIRST_CAPACITY)
                self._token_ids = np.concatenate((self._token_ids, np.zeros(room, dtype=np.int64)))
                self._num_output = np.concatenate((self._num_output, np.zeros(room, dtype=np.float64)))
            self._token_ids[place] = token_id
            self._num_output[place] += 1.0
        self._num_counted = len(self._output)


def only_lowers(params: SamplingParams) -> bool:
    """Whether no logit can rise, so that tokens left out of the candidates stay below those that kept their place."""
    return (
        params.repetition_penalty >= 1.0
        and params.presence_penalty >= 0.0
        and params.frequency_penalty >= 0.0
        and all(bias <= 0.0 for bias in params.logit_bias.values())
    )


def num_lowered(params: SamplingParams, counts: TokenCounts) -> int:
    """At most so many tokens of the vocabulary have a logit that bias and penalties change."""
    token_ids, num_output = counts.arrays()
    num_penalized = len(token_ids) if params.repetition_penalty != 1.0 else int(np.count_nonzero(num_output))
    return num_penalized + len(params.logit_bias)


def shape_row(logits: _Float32s, params: SamplingParams, counts: TokenCounts) -> _Float32s:
    """A whole row with bias and penalties applied, as a new array. logits: [vocab_size]."""
    token_ids, num_output = counts.arrays()
    num_seen = len(token_ids)
    bias = np.zeros(num_seen, dtype=np.float64)
    if params.logit_bias:
        places = counts.places(params.logit_bias)
        biases = np.fromiter(params.logit_bias.values(), dtype=np.float64, count=len(places))
        biased_ids = np.fromiter(params.logit_bias, dtype=np.int64, count=len(places))
        seen = places >= 0
        bias[places[seen]] = biases[seen]
        token_ids = np.concatenate((token_ids, biased_ids[~seen]))
        bias = np.concatenate((bias, biases[~seen]))
        num_output = np.concatenate((num_output, np.zeros(len(bias) - num_seen)))
    shaped = logits.copy()
    shaped[token_ids] = _shape(shaped[token_ids], bias, np.arange(len(token_ids)) < num_seen, num_output, params)
    return shaped


def shape_candidates(
    token_ids: npt.NDArray[np.int32], logits: _Float32s, params: SamplingParams, counts: TokenCounts
) -> _Float32s:
    """The candidates' logits with bias and penalties applied, [k]: to the bit what `shape_row` makes of them."""
    ids = token_ids.tolist()
    places = counts.places(ids)
    seen = places >= 0
    num_output = np.zeros(len(ids), dtype=np.float64)
    num_output[seen] = counts.arrays()[1][places[seen]]
    bias = np.zeros(len(ids), dtype=np.float64)
    if params.logit_bias:
        bias[:] = [params.logit_bias.get(token_id, 0.0) for token_id in ids]
    return _shape(logits, bias, seen, num_output, params)


def _shape(
    logits: _Float32s, bias: _Float64s, seen: npt.NDArray[np.bool_], num_output: _Float64s, params: SamplingParams
) -> _Float32s:
    """The formulas of this file, element by element; [m] each."""
    x = logits.astype(np.float64) + bias
    repetition = params.repetition_penalty
    if repetition != 1.0:
        x = np.where(seen, np.where(x > 0, x / repetition, x * repetition), x)
    x -= params.frequency_penalty * num_output
    x -= params.presence_penalty * (num_output > 0)
    return x.astype(np.float32)
