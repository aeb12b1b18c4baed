"""The probe goes when no token came for a while, asks for little, and knows a token when it gets one."""

from __future__ import annotations

import numpy as np
import pytest

from stagecoach.errors import ShardFault
from stagecoach_router.engine.health_probe import MAX_LOAD, SEQ_ID, HealthProbe
from stagecoach_router.sampling.outputs import CandidateRows


@pytest.fixture
def probe() -> HealthProbe:
    return HealthProbe(2.0, slot=7, vocab_size=1000)


def outputs(probe: HealthProbe, logit: float):
    rows = CandidateRows(np.array([[5]], dtype=np.int32), np.array([[logit]], dtype=np.float32), None, None)
    return [(probe.plan(3).rows, rows)]


def test_one_goes_at_once_and_then_after_each_interval_without_a_token(probe):
    assert probe.is_due(100.0)
    probe.take(outputs(probe, 1.0), 100.0, 0.01)
    assert [probe.is_due(now_s) for now_s in (100.0, 101.9, 102.0)] == [False, False, True]


def test_a_requests_token_does_as_well(probe):
    probe.token_came(100.0)
    assert not probe.is_due(101.0)
    probe.token_came(101.5)
    assert not probe.is_due(103.0)
    assert probe.is_due(103.5)


def test_a_pipeline_that_was_opened_anew_has_yet_to_prove_itself(probe):
    probe.token_came(100.0)
    probe.forget()
    assert probe.is_due(100.0)


def test_a_slow_pipeline_is_not_kept_busy_by_it(probe):
    probe.take(outputs(probe, 1.0), 100.0, 3.0)
    assert not probe.is_due(100.0 + 0.9 * 3.0 / MAX_LOAD)
    assert probe.is_due(100.0 + 3.0 / MAX_LOAD)


def test_it_is_one_row_of_one_token_in_its_own_slot_and_block(probe):
    plan = probe.plan(3)
    [row] = plan.rows
    assert (row.sequence.seq_id, row.slot, row.start, row.num_tokens, row.wants_logits) == (SEQ_ID, 7, 0, 1, True)
    assert [tuple(update) for update in plan.block_table_updates] == [(7, 0, (3,))]
    assert row.sequence.next_want.num_candidates == 1


@pytest.mark.parametrize("logit", [np.nan, np.inf])
def test_what_is_no_number_is_no_token(probe, logit):
    with pytest.raises(ShardFault):
        probe.take(outputs(probe, logit), 100.0, 0.01)
    assert probe.is_due(100.0)
