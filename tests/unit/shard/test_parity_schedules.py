"""However a scheduler lays rows into micro-batches and blocks, a sequence's logits are those of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.shard.parity_schedules import LENGTHS, SCHEDULES, SPLITS, Known
from tests.unit.shard.stage_chain import StageChain
from tests.unit.shard.tiny_models import MODELS

NAMES = list(MODELS)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    """Each model, written when it is first asked for."""
    made: dict[str, Known] = {}

    def get(name: str) -> Known:
        if name not in made:
            made[name] = Known.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_every_model_goes_through_every_schedule(
    known: Callable[[str], Known], name: str, schedule: Callable[[Known, StageChain], None]
) -> None:
    # Half the splits each time, the other half for the next model and the next schedule.
    turn = NAMES.index(name) + SCHEDULES.index(schedule)
    for split in SPLITS[turn % 2 :: 2]:
        schedule(known(name), known(name).chain(split))


@given(data=st.data())
def test_any_split_into_rows_gives_the_same_logits(known: Callable[[str], Known], data: st.DataObject) -> None:
    model = known(data.draw(st.sampled_from(NAMES)))
    chain = model.chain(data.draw(st.sampled_from(SPLITS)))
    blocks = data.draw(st.permutations(range(24)))
    sequences, taken = [], 0
    for index, length in enumerate(LENGTHS):
        needed = -(-length // chain.block_size)
        sequences.append(model.running(index, list(blocks[taken : taken + needed])))
        taken += needed
    while unfinished := [running for running in sequences if running.position < len(running.token_ids)]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique_by=id))
        chain.step(
            *(
                (running, min(data.draw(st.sampled_from((1, 1, 2, 5, 16))), len(running.token_ids) - running.position))
                for running in chosen
            )
        )
    for index, running in enumerate(sequences):
        model.check(index, running)
