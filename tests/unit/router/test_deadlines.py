"""A sequence past its deadline is out of the scheduler, whatever it was doing, and nobody else is."""

from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.scheduling.deadlines import MAX_STALE_ENTRIES, Deadlines
from tests.unit.router.test_scheduler import add, finish, make_scheduler, make_sequence, rows_of


def with_deadline(scheduler, seq_id, prompt, deadline_s):
    sequence = add(scheduler, seq_id, prompt)
    scheduler.set_deadline(sequence, deadline_s)
    return sequence


def test_one_that_waits_leaves_the_line_at_its_deadline_and_not_before():
    scheduler = make_scheduler(max_running=1)
    add(scheduler, 1, 4)
    finish(scheduler, scheduler.schedule())
    waiting = with_deadline(scheduler, 2, 4, 10.0)
    assert scheduler.next_deadline_s == 10.0
    assert scheduler.expire(9.99) == []
    assert scheduler.num_waiting == 1
    assert scheduler.expire(10.0) == [waiting]
    assert (scheduler.num_waiting, scheduler.next_deadline_s) == (0, None)


def test_one_that_is_prefilled_costs_nothing_more():
    scheduler = make_scheduler(num_lanes=2)
    prefilled = with_deadline(scheduler, 1, 40, 10.0)
    plan = scheduler.schedule()
    assert rows_of(plan) == [(1, 0, 16, False)]
    assert scheduler.expire(11.0) == [prefilled]
    assert scheduler.schedule() is None
    scheduler.complete(plan)
    assert not scheduler.has_work()
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_one_that_decodes_is_not_sampled_any_more():
    scheduler = make_scheduler()
    decoding = with_deadline(scheduler, 1, 4, 10.0)
    other = add(scheduler, 2, 4)
    finish(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert scheduler.expire(10.0) == [decoding]
    assert [row.sequence for row in scheduler.complete(plan)] == [other]
    assert decoding.output_tokens == [7]
    assert scheduler.num_running == 1


def test_a_finished_sequence_has_no_deadline():
    scheduler = make_scheduler()
    sequence = with_deadline(scheduler, 1, 4, 10.0)
    scheduler.remove(sequence)
    assert scheduler.next_deadline_s is None
    scheduler.set_deadline(sequence, 20.0)
    assert scheduler.expire(30.0) == []


def test_a_later_call_moves_the_deadline_or_lifts_it():
    scheduler = make_scheduler()
    sequence = with_deadline(scheduler, 1, 4, 10.0)
    scheduler.set_deadline(sequence, 20.0)
    assert scheduler.expire(15.0) == []
    scheduler.set_deadline(sequence, None)
    assert scheduler.expire(25.0) == []


def test_preemption_keeps_the_deadline():
    scheduler = make_scheduler()
    sequence = with_deadline(scheduler, 1, 4, 10.0)
    scheduler.schedule()
    scheduler.preempt_all()
    assert scheduler.expire(10.0) == [sequence]
    assert not scheduler.has_work()


@given(st.lists(st.tuples(st.integers(1, 6), st.one_of(st.none(), st.floats(0, 100)))), st.floats(0, 100))
def test_those_expire_whose_latest_deadline_is_past_in_order(changes, now_s):
    deadlines, model = Deadlines(), {}
    sequences = {seq_id: make_sequence(seq_id, 1) for seq_id in range(1, 7)}
    for seq_id, deadline_s in changes:
        if deadline_s is None:
            deadlines.discard(sequences[seq_id])
            model.pop(seq_id, None)
        else:
            deadlines.set(sequences[seq_id], deadline_s)
            model[seq_id] = deadline_s
    assert deadlines.next_s == min(model.values(), default=None)
    expected = sorted((deadline_s, seq_id) for seq_id, deadline_s in model.items() if deadline_s <= now_s)
    assert [sequence.seq_id for sequence in deadlines.take_expired(now_s)] == [seq_id for _, seq_id in expected]
    assert len(deadlines) == len(model) - len(expected)


def test_sequences_that_finish_early_leave_nothing_behind():
    """Deadlines are hours away as a rule, and requests come and go by the thousand."""
    deadlines = Deadlines()
    for seq_id in range(10_000):
        sequence = make_sequence(seq_id, 1)
        deadlines.set(sequence, 3600.0 + seq_id)
        deadlines.discard(sequence)
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= MAX_STALE_ENTRIES + 1
