"""A fixed set of distinct requests, what an undisturbed cluster answers to them, and whether another answer is equal.

Sampled ones draw from three tokens: a batch of another shape rounds otherwise, and each border between two tokens is
where one random number in some hundred thousand then falls on the other side. Log-probabilities are compared within a
tolerance for the same reason.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagecoach_client import AsyncClient, Generation

LOGPROB_TOLERANCE = 1e-4
WORDS = (
    "the",
    "coach",
    "rolled",
    "on",
    "through",
    "rain",
    "while",
    "seven",
    "horses",
    "knew",
    "each",
    "stone",
    "of",
    "it",
)
# What each kind of request asks for; the kinds take turns.
KINDS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0},
    {"top_k": 3},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"top_k": 3, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 0.0, "logprobs": 2},
    {"top_k": 3, "n": 3},
    {"top_k": 3, "repetition_penalty": 1.1, "stops": True},
    {"temperature": 0.0, "frequency_penalty": 0.2, "stops": True},
    {"top_k": 3, "logprobs": 0, "presence_penalty": 0.2, "n": 2},
)
# What ends an answer is taken from its own text, without stops. U+FFFD stands for bytes that are no character.
STOP_STRING = re.compile("[^\ufffd]{2,4}")


@dataclass(frozen=True, slots=True)
class MixedRequest:
    """Arguments of `generate`, and the answer of an undisturbed cluster."""

    options: Mapping[str, Any]
    expected: Generation

    @property
    def num_completions(self) -> int:
        return len(self.expected.completions)


async def with_answers(
    client: AsyncClient, count: int, *, prompt_words: tuple[int, int], max_tokens: tuple[int, int]
) -> list[MixedRequest]:
    """`count` requests, always the same ones, of so many words and tokens at least and at most; as `client` answers."""
    drafts = [_draft(index, prompt_words, max_tokens) for index in range(count)]
    options = await asyncio.gather(*(_with_stop_string(client, draft) for draft in drafts))
    answers = await asyncio.gather(*(client.generate(**each) for each in options))
    for draft, answer in zip(drafts, answers, strict=True):
        if draft.get("stops"):
            assert answer.completions[0].finish_reason == "stop", "a stop string of the answer itself ends it"
    return [MixedRequest(*pair) for pair in zip(options, answers, strict=True)]


def _draft(index: int, prompt_words: tuple[int, int], max_tokens: tuple[int, int]) -> dict[str, Any]:
    dice = random.Random(index)
    prompt = " ".join(dice.choice(WORDS) for _ in range(dice.randint(*prompt_words)))
    kind = KINDS[index % len(KINDS)]
    return {
        "prompt": f"{index} {prompt}",
        "seed": index,
        "max_tokens": dice.randint(*max_tokens),
        "ignore_eos": index % 4 != 3,
        **kind,
    }


async def _with_stop_string(client: AsyncClient, draft: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in draft.items() if name != "stops"}
    if not draft.get("stops"):
        return options
    text = (await client.generate(**options)).text
    places = list(STOP_STRING.finditer(text))
    assert places, f"{text!r} has a stop string in it"
    stop = places[len(places) // 2].group()
    return options | {"stop": [stop, "never to be found"]}


def difference(expected: Generation, came: Generation) -> str | None:
    """What is not as expected, in one line; None where all is.

    How much of a prompt was cached is left out: a cluster that lost a stage has lost its prefix cache, too.
    """
    usages = [(usage.prompt_tokens, usage.completion_tokens) for usage in (expected.usage, came.usage)]
    if usages[0] != usages[1]:
        return f"usage (prompt, completion) {usages[0]} expected, {usages[1]} came"
    for one, other in zip(expected.completions, came.completions, strict=True):
        name = f"completion {one.index}"
        if one.token_ids != other.token_ids:
            return f"{name}: {_first_difference(one.token_ids, other.token_ids)}"
        if (one.text, one.finish_reason) != (other.text, other.finish_reason):
            pairs = [(each.text[-40:], each.finish_reason) for each in (one, other)]
            return f"{name}: the same tokens, but {pairs[0]} expected, {pairs[1]} came"
        logprobs = [
            [[position.chosen.logprob, *(token.logprob for token in position.top)] for position in each.logprobs]
            for each in (one, other)
        ]
        if not _close(*logprobs):
            return f"{name}: log-probabilities differ by more than {LOGPROB_TOLERANCE}"
    return None


def _first_difference(expected: Sequence[int], came: Sequence[int]) -> str:
    same = next((at for at, pair in enumerate(zip(expected, came, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(expected), len(came)) if same is None else same
    around = slice(max(0, at - 2), at + 4)
    return f"token {at} of {len(expected)} and {len(came)}: {expected[around]} expected, {came[around]} came"


def _close(expected: Sequence[Sequence[float]], came: Sequence[Sequence[float]]) -> bool:
    return [len(each) for each in expected] == [len(each) for each in came] and all(
        abs(one - other) <= LOGPROB_TOLERANCE
        for pair in zip(expected, came, strict=True)
        for one, other in zip(*pair, strict=True)
    )
