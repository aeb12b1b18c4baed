"""`python -m tests.soak.kills --model DIR --kills N --seed S`: streams go on while stages are killed under them.

Always so many streams run: greedy and seeded, with penalties, stop strings, log-probabilities and several completions.
Stages are killed at seeded moments, one or all at once, and started again. Each stream has to end with exactly the
answer of an undisturbed cluster. What is seeded are the choices; when exactly a signal arrives is the machine's affair.

A router gives up a request that was under way in four losses of its pipeline and got no token in between, as that may
be what breaks it. So a kill waits until every sequence has had a token since the last one, except that one kill in
between may strike the replay itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stagecoach.errors import StagecoachError
from stagecoach_client import AsyncClient
from tests.soak.cluster import READ_TIMEOUT_S, Cluster, Deployment, check_nothing_is_left, running
from tests.soak.failure import Failed
from tests.soak.mixed_requests import MixedRequest, difference, with_answers
from tests.soak.supervised import Supervised, kill_and_restart

PROGRESS_TIMEOUT_S = 90.0
STREAM_TIMEOUT_S = 600.0
# How many tokens of all streams together may come between two kills, beside what each is waited for.
MAX_TOKENS_BETWEEN = 400
NUM_SHOWN_LINES = 30
MAX_PREFILL_ATTEMPTS = 5
MOMENTS = ("decode", "prefill", "replay")


@dataclass(eq=False)
class _Stream:
    """One that runs, and how many tokens of each completion have come. None: that completion has ended."""

    request: MixedRequest
    num_tokens: list[int | None]

    @classmethod
    def of(cls, request: MixedRequest) -> _Stream:
        return cls(request, [0] * request.num_completions)


class _Seen(NamedTuple):
    """Of all pipelines: their epochs, and how many tokens their first stages have computed, in all epochs."""

    epoch: int
    num_tokens: int


@dataclass
class Tally:
    """What happened."""

    num_streams: int = 0  # that ended
    num_stopped: int = 0  # of them, by a stop string or an end-of-sequence token
    num_tokens: int = 0
    kills: dict[str, int] = field(default_factory=dict)  # by moment and stages

    def __str__(self) -> str:
        kills = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        return (
            f"{sum(self.kills.values())} kills ({kills}); {self.num_streams} streams with {self.num_tokens} tokens, "
            f"{self.num_stopped} of them stopped before their limit"
        )


class Streams:
    """Keeps `count` streams running, the next request as soon as one ends, until `finish`."""

    def __init__(self, client: AsyncClient, requests: Sequence[MixedRequest], count: int, dice: random.Random) -> None:
        self.tally = Tally()
        self.active: set[_Stream] = set()
        self._client = client
        self._requests = itertools.cycle(dice.sample(requests, len(requests)))
        self._finishing = False
        self._changed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._keep_streaming()) for _ in range(count)]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Looks at `condition` whenever a token comes. Raises what a stream failed with, and Failed after a while."""
        try:
            async with asyncio.timeout(PROGRESS_TIMEOUT_S):
                while not condition():
                    self._raise_failure()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise Failed(f"no {what} within {PROGRESS_TIMEOUT_S:g} s") from error

    async def progress(self) -> None:
        """Returns when each sequence that runs now has had a token, or has ended."""
        before = {stream: list(stream.num_tokens) for stream in self.active}

        def moved() -> bool:
            return all(
                was is None or now is None or now > was
                for stream, counts in before.items()
                if stream in self.active
                for was, now in zip(counts, stream.num_tokens, strict=True)
            )

        await self.until(moved, "token for each stream")

    async def tokens(self, count: int) -> None:
        """Returns when so many more have come, of any stream."""
        enough = self.tally.num_tokens + count
        await self.until(lambda: self.tally.num_tokens >= enough, f"{count} tokens")

    async def finish(self) -> None:
        """Begins no more, and returns when those that run have ended."""
        self._finishing = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), PROGRESS_TIMEOUT_S)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, stream: _Stream, cache_salt: str = "") -> None:
        """One request to its end. Raises Failed where the answer is another one."""
        request = stream.request
        self.active.add(stream)
        try:
            call = await self._client.generate(
                stream=True, cache_salt=cache_salt, timeout_s=STREAM_TIMEOUT_S, **request.options
            )
            async for chunk in call:
                count = stream.num_tokens[chunk.index]
                assert count is not None, "the SDK refuses deltas after an end"
                ended = chunk.finish_reason is not None
                stream.num_tokens[chunk.index] = None if ended else count + len(chunk.token_ids)
                self.tally.num_tokens += len(chunk.token_ids)
                self._changed.set()
            answer = await call.collect()
        except StagecoachError as error:
            raise Failed(f"{request.options}: {type(error).__name__}: {error}") from error
        finally:
            self.active.discard(stream)
            self._changed.set()
        different = difference(request.expected, answer)
        if different is not None:
            raise Failed(f"{request.options}: {different}")
        self.tally.num_streams += 1
        self.tally.num_stopped += any(each.finish_reason == "stop" for each in answer.completions)

    def begin(self, request: MixedRequest, *, cache_salt: str) -> _Stream:
        """One more beside them, to its end."""
        stream = _Stream.of(request)
        self.active.add(stream)
        self._tasks.append(asyncio.create_task(self._run(stream, cache_salt)))
        return stream

    async def _keep_streaming(self) -> None:
        while not self._finishing:
            await self._run(_Stream.of(next(self._requests)))

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()


class Killer:
    """Kills stages of a cluster at seeded moments, and starts them again."""

    def __init__(
        self,
        cluster: Cluster,
        client: AsyncClient,
        streams: Streams,
        requests: Sequence[MixedRequest],
        dice: random.Random,
    ) -> None:
        self._cluster = cluster
        self._client = client
        self._streams = streams
        self._requests = requests
        self._dice = dice

    async def run(self, num_kills: int) -> None:
        """As often as that: each moment and each choice of stages equally often, in random order."""
        num_stages = len((await self._client.status()).pipelines[0].stages)
        victims = [[index] for index in range(num_stages)] + [list(range(num_stages))]
        plan: list[tuple[str, list[int]]] = []
        while len(plan) < num_kills:
            every = list(itertools.product(MOMENTS, victims))
            plan += self._dice.sample(every, len(every))
        del plan[num_kills:]
        # A replay is struck only after a kill that struck none, and never first: there has to be one.
        may_strike_replay = False
        while plan:
            at = next((at for at, (moment, _) in enumerate(plan) if moment != "replay" or may_strike_replay), 0)
            moment, targets = plan.pop(at)
            moment = await self._wait_for(moment if may_strike_replay or moment != "replay" else "decode")
            may_strike_replay = moment != "replay"
            name = f"{moment} of stage {' and '.join(map(str, targets))}"
            kill_and_restart(*await self._shards_at(targets))
            self._streams.tally.kills[name] = self._streams.tally.kills.get(name, 0) + 1

    async def _shards_at(self, stages: list[int]) -> list[Supervised]:
        """The shards that are these stages now: of one pipeline, or, where all stages are meant, of all of them."""
        pipelines = (await self._client.status(timeout_s=READ_TIMEOUT_S)).pipelines
        if len(stages) == 1:
            pipelines = (self._dice.choice([each for each in pipelines if each.ready] or pipelines),)
        addresses = {pipeline.stages[stage].address for pipeline in pipelines for stage in stages}
        return [shard for shard in self._cluster.shards if shard.address in addresses]

    async def _wait_for(self, moment: str) -> str:
        """Returns at such a moment; if a prefill was always over too soon, it says that it is another one."""
        if moment == "replay":
            await self._replay_begins()
            return moment
        await self._streams.progress()
        await self._streams.tokens(self._dice.randint(1, MAX_TOKENS_BETWEEN))
        if moment == "prefill" and not await self._prefill_is_under_way():
            return "decode"
        return moment

    async def _replay_begins(self) -> None:
        """Returns when some of the tokens of the next epoch have been computed. The last epoch's stage is dead."""
        before = await self._first_stage()
        async with asyncio.timeout(PROGRESS_TIMEOUT_S):
            while (now := await self._first_stage()).epoch == before.epoch or now.num_tokens == before.num_tokens:
                self._cluster.check()

    async def _prefill_is_under_way(self) -> bool:
        """Begins requests until one is caught while its prompt, of which nothing is cached, is computed."""
        for _ in range(MAX_PREFILL_ATTEMPTS):
            request = self._dice.choice(self._requests)
            num_wanted = self._dice.randint(1, request.expected.usage.prompt_tokens)
            before = await self._first_stage()
            stream = self._streams.begin(request, cache_salt=str(self._dice.random()))
            while stream in self._streams.active and not stream.num_tokens[0]:
                now = await self._first_stage()
                if now.num_tokens - before.num_tokens >= num_wanted and stream.num_tokens[0] == 0:
                    return True
        return False

    async def _first_stage(self) -> _Seen:
        pipelines = (await self._client.status(timeout_s=READ_TIMEOUT_S)).pipelines
        num_tokens = sum(pipeline.stages[0].num_tokens for pipeline in pipelines if pipeline.stages)
        return _Seen(sum(pipeline.epoch for pipeline in pipelines), num_tokens)


async def survive(
    deployment: Deployment,
    *,
    num_kills: int,
    num_streams: int,
    seed: int,
    num_requests: int,
    prompt_words: tuple[int, int],
    max_tokens: tuple[int, int],
) -> Tally:
    """The whole test. Raises Failed with the seed and what is wrong."""
    dice = random.Random(seed)
    async with running(deployment) as cluster, AsyncClient(cluster.address) as client:
        requests = await with_answers(client, num_requests, prompt_words=prompt_words, max_tokens=max_tokens)
        streams = Streams(client, requests, num_streams, dice)
        try:
            await Killer(cluster, client, streams, requests, dice).run(num_kills)
            await streams.finish()
            await check_nothing_is_left(cluster, client)
        except (Failed, StagecoachError, TimeoutError) as error:
            log = "".join(f"\n  {line}" for line in cluster.router.lines[-NUM_SHOWN_LINES:])
            what = f"{type(error).__name__} {error} after {streams.tally}"
            raise Failed(f"seed {seed}: {what}; the router's last lines:{log}") from error
        finally:
            await streams.stop()
    return streams.tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint, served in float32")
    parser.add_argument("--stages", default="0:15,15:30", help="layer ranges")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args(argv)
    deployment = Deployment(
        options.model,
        options.stages.split(","),
        ("--dtype", "float32", "--kv-cache-memory", "1G"),
        ("--max-batch-tokens", "128"),
    )
    try:
        tally = asyncio.run(
            survive(
                deployment,
                num_kills=options.kills,
                num_streams=options.streams,
                seed=options.seed,
                num_requests=2 * options.streams,
                prompt_words=(20, 300),
                max_tokens=(40, 120),
            )
        )
    except (Failed, StagecoachError) as error:  # the latter: it did not even start
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"seed {options.seed}: {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
