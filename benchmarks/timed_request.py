"""One greedy request of given token ids, timed as its caller sees it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from stagecoach.errors import InternalError, OutOfRange
from stagecoach_cli.load_figures import RequestTimes
from stagecoach_client import AsyncClient, Model


async def only_model(client: AsyncClient, needed_tokens: int) -> Model:
    """The cluster's model. Raises OutOfRange where its context is shorter than `needed_tokens`."""
    [model] = await client.models()
    if needed_tokens > model.context_length:
        text = f"prompt and output come to {needed_tokens} tokens; the context length is {model.context_length}"
        raise OutOfRange(text, field="prompt_tokens", limit=model.context_length, value=needed_tokens)
    return model


def random_tokens(count: int, model: Model) -> list[int]:
    """New ones each time, so that the prefix cache knows none of them."""
    return [random.randrange(model.vocab_size) for _ in range(count)]


async def timed_request(
    client: AsyncClient,
    model: Model,
    prompt: Sequence[int],
    output_tokens: int,
    on_tokens: Callable[[RequestTimes], None] = lambda _: None,
) -> RequestTimes:
    """When its tokens came; `on_tokens` is told each time. Raises InternalError where too few came."""
    times = RequestTimes(time.perf_counter())
    async with await client.generate(
        token_ids=prompt, model=model.name, max_tokens=output_tokens, temperature=0.0, ignore_eos=True, stream=True
    ) as stream:
        async for chunk in stream:
            if chunk.token_ids:
                times.arrivals.append((time.perf_counter(), len(chunk.token_ids)))
                on_tokens(times)
            times.cached_tokens += chunk.usage.cached_tokens if chunk.usage is not None else 0
    if times.num_tokens != output_tokens:
        text = f"a request asked for {output_tokens} tokens and got {times.num_tokens}"
        raise InternalError(text, field="output_tokens", limit=output_tokens, value=times.num_tokens)
    return times
