"""What the scheduler plans, case by case."""

import pytest

from stagecoach.errors import OutOfRange, Overloaded
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.retry_after import MAX_S, WINDOW_S
from stagecoach_router.scheduling.scheduler import Scheduler
from stagecoach_router.scheduling.sequence import Sequence

BLOCK_SIZE = 4


def make_scheduler(num_blocks=64, **options):
    limits = {"max_batch_tokens": 16, "max_running": 8, "max_waiting": 8, "num_lanes": 1, "context_length": 1000}
    return Scheduler(BlockManager(num_blocks, BLOCK_SIZE), **(limits | options))


def make_sequence(seq_id, prompt, max_tokens=20, **options):
    """A prompt is given as its tokens, or as how many of them; those are then like no other sequence's."""
    tokens = tuple(range(1000 * seq_id, 1000 * seq_id + prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(seq_id=seq_id, prompt_tokens=tokens, params=params, seed=0, **options)


def add(scheduler, seq_id, prompt, max_tokens=20, **options):
    sequence = make_sequence(seq_id, prompt, max_tokens, **options)
    scheduler.add(sequence)
    return sequence


def rows_of(plan):
    return [(row.sequence.seq_id, row.start, row.num_tokens, row.wants_logits) for row in plan.rows]


def finish(scheduler, plan, token=7):
    """The step comes back, and every row that wanted logits gets a token."""
    for row in scheduler.complete(plan):
        scheduler.append_token(row.sequence, token)


def step(scheduler):
    plan = scheduler.schedule()
    finish(scheduler, plan)
    return rows_of(plan)


# ---- rows


def test_prompt_then_one_token_at_a_time():
    scheduler = make_scheduler()
    sequence = add(scheduler, 1, 5)
    assert step(scheduler) == [(1, 0, 5, True)]
    assert step(scheduler) == [(1, 5, 1, True)]
    assert step(scheduler) == [(1, 6, 1, True)]
    assert sequence.output_tokens == [7, 7, 7]


def test_long_prompt_goes_in_chunks_of_the_budget_without_waiting_for_results():
    scheduler = make_scheduler(num_lanes=4)
    add(scheduler, 1, 40)
    plans = [scheduler.schedule() for _ in range(4)]
    assert [rows_of(plan) for plan in plans[:3]] == [[(1, 0, 16, False)], [(1, 16, 16, False)], [(1, 32, 8, True)]]
    assert plans[3] is None, "it awaits its token"
    assert scheduler.complete(plans[0]) == scheduler.complete(plans[1]) == []
    assert [row.sequence.seq_id for row in scheduler.complete(plans[2])] == [1]


def test_step_is_filled_with_prompts_in_order_of_arrival():
    scheduler = make_scheduler(num_lanes=3)
    for seq_id in (1, 2, 3):
        add(scheduler, seq_id, 10)
    assert rows_of(scheduler.schedule()) == [(1, 0, 10, True), (2, 0, 6, False)]
    assert rows_of(scheduler.schedule()) == [(2, 6, 4, True), (3, 0, 10, True)]


def test_no_more_steps_in_flight_than_lanes():
    scheduler = make_scheduler(num_lanes=2)
    add(scheduler, 1, 100)
    first = scheduler.schedule()
    scheduler.schedule()
    assert scheduler.num_in_flight == 2
    assert scheduler.schedule() is None
    scheduler.complete(first)
    assert scheduler.schedule() is not None


def test_idle_scheduler_has_nothing_to_do():
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_work()


# ---- sharing steps


def test_decodes_come_first_and_prefill_gets_the_rest_of_the_budget():
    scheduler = make_scheduler()
    add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    step(scheduler)
    add(scheduler, 3, 50)
    assert step(scheduler) == [(1, 3, 1, True), (2, 3, 1, True), (3, 0, 14, False)]


def test_lanes_share_the_decodes_and_rebalance_when_some_finish():
    scheduler = make_scheduler(num_lanes=2)
    sequences = [add(scheduler, seq_id, 2) for seq_id in range(8)]
    step(scheduler)
    lanes = [scheduler.schedule(), scheduler.schedule()]
    assert [len(plan.rows) for plan in lanes] == [4, 4]
    for sequence in sequences[:3]:
        scheduler.remove(sequence)
    sizes = []
    for _ in range(4):
        finish(scheduler, lanes.pop(0))
        lanes.append(scheduler.schedule())
        sizes.append(len(lanes[-1].rows))
    # 5 are left, so a lane takes 3 at most: the first lane goes on with 1, the second leaves it one of its 4.
    assert sizes == [1, 3, 2, 3]


def test_prompts_that_are_still_computed_do_not_count_when_lanes_share_decodes():
    scheduler = make_scheduler(num_lanes=2)
    for seq_id in range(4):
        add(scheduler, seq_id, 2)
    step(scheduler)
    add(scheduler, 5, 100)
    for _ in range(2):
        plans = [scheduler.schedule(), scheduler.schedule()]
        assert [[row[0] for row in rows_of(plan)] for plan in plans] == [[0, 1, 5], [2, 3, 5]]
        for plan in plans:
            finish(scheduler, plan)


def test_single_sequence_does_not_wait_for_other_lanes():
    scheduler = make_scheduler(num_lanes=4)
    add(scheduler, 1, 2)
    for _ in range(5):
        plan = scheduler.schedule()
        assert len(plan.rows) == 1
        assert scheduler.schedule() is None
        finish(scheduler, plan)


@pytest.mark.parametrize("budget", [1, 2, 4, 8])
def test_neither_decodes_nor_prefill_starve_when_decodes_fill_the_budget(budget):
    scheduler = make_scheduler(num_blocks=1200, max_batch_tokens=budget, max_running=10)
    decoding = [add(scheduler, seq_id, 1, max_tokens=500) for seq_id in range(8)]
    while not all(sequence.output_tokens for sequence in decoding):
        step(scheduler)
    prompt = add(scheduler, 99, 20)
    before = [len(sequence.output_tokens) for sequence in decoding]
    for _ in range(100):
        step(scheduler)
        if prompt.output_tokens:
            break
    assert prompt.output_tokens
    for _ in range(2 * 9):
        step(scheduler)
    assert all(len(sequence.output_tokens) > count for sequence, count in zip(decoding, before, strict=True))


def test_prefill_that_was_kept_waiting_gets_all_that_decodes_leave():
    scheduler = make_scheduler(max_batch_tokens=8, max_running=10)
    decoding = [add(scheduler, seq_id, 1) for seq_id in range(8)]
    step(scheduler)
    add(scheduler, 99, 50)
    assert [row[0] for row in step(scheduler)] == list(range(8))
    for sequence in decoding[2:]:
        scheduler.remove(sequence)
    assert step(scheduler) == [(99, 0, 6, False), (0, 2, 1, True), (1, 2, 1, True)]


def test_decodes_go_on_while_prompts_keep_coming():
    scheduler = make_scheduler()
    first = add(scheduler, 1, 2, max_tokens=100)
    step(scheduler)
    for seq_id in range(2, 8):
        add(scheduler, seq_id, 100)
    for _ in range(10):
        count = len(first.output_tokens)
        step(scheduler)
        assert len(first.output_tokens) == count + 1


# ---- block tables on the wire


def test_whole_table_first_and_only_new_entries_after_that():
    scheduler = make_scheduler()
    sequence = add(scheduler, 1, 6)
    plan = scheduler.schedule()
    assert [(update.slot, update.first) for update in plan.block_table_updates] == [(sequence.slot, 0)]
    assert len(plan.block_table_updates[0].block_ids) == 2
    finish(scheduler, plan)
    sent = []
    for _ in range(6):
        plan = scheduler.schedule()
        sent.append([(update.first, len(update.block_ids)) for update in plan.block_table_updates])
        finish(scheduler, plan)
    assert sent == [[], [], [(2, 1)], [], [], []]


def test_reused_slot_gets_its_table_from_the_start():
    scheduler = make_scheduler(max_running=1)
    first = add(scheduler, 1, 6)
    plan = scheduler.schedule()
    scheduler.remove(first)
    second = add(scheduler, 2, 10)
    assert scheduler.schedule() is None, "the only lane is in flight"
    scheduler.complete(plan)
    (update,) = scheduler.schedule().block_table_updates
    assert (update.slot, update.first, len(update.block_ids)) == (0, 0, 3)
    assert second.slot == 0


def test_decode_does_not_read_the_prompt_again():
    class CountingTuple(tuple):
        num_read = 0

        def __getitem__(self, key):
            CountingTuple.num_read += len(range(len(self))[key]) if isinstance(key, slice) else 1
            return super().__getitem__(key)

        def __iter__(self):
            CountingTuple.num_read += len(self)
            return super().__iter__()

    scheduler = make_scheduler(num_blocks=1000, max_batch_tokens=2000, context_length=3000)
    sequence = make_sequence(1, 1001, max_tokens=100)
    sequence.prompt_tokens = CountingTuple(sequence.prompt_tokens)
    scheduler.add(sequence)
    step(scheduler)
    assert CountingTuple.num_read <= 1001, "each full block is hashed once"
    CountingTuple.num_read = 0
    for _ in range(50):
        step(scheduler)
    assert CountingTuple.num_read <= BLOCK_SIZE, "only the block that was not full yet"


# ---- removal


@pytest.mark.parametrize("state", ["never added", "waiting", "in flight", "handed out", "ready", "between chunks"])
def test_removal_frees_everything_at_once(state):
    scheduler = make_scheduler(num_lanes=2)
    sequence = make_sequence(1, 20 if state == "between chunks" else 5)
    if state != "never added":
        scheduler.add(sequence)
    plan = None if state in ("never added", "waiting") else scheduler.schedule()
    if state in ("handed out", "ready"):
        (row,) = scheduler.complete(plan)
        if state == "ready":
            scheduler.append_token(row.sequence, 7)
    scheduler.remove(sequence)
    scheduler.remove(sequence)
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert scheduler.schedule() is None
    if plan is not None:
        assert scheduler.complete(plan) == []


def test_result_of_a_removed_sequence_does_not_reach_its_slots_next_user():
    scheduler = make_scheduler(max_running=1, num_lanes=2)
    add(scheduler, 1, 3)
    old = scheduler.schedule()
    scheduler.remove(old.rows[0].sequence)
    add(scheduler, 2, 3)
    new = scheduler.schedule()
    assert new.rows[0].slot == old.rows[0].slot
    assert scheduler.complete(old) == []
    assert [row.sequence.seq_id for row in scheduler.complete(new)] == [2]


# ---- prefix cache


def test_prompt_seen_before_is_not_computed_again():
    scheduler = make_scheduler()
    first = add(scheduler, 1, range(10))
    step(scheduler)
    scheduler.remove(first)
    second = add(scheduler, 2, range(10))
    assert step(scheduler) == [(2, 8, 2, True)]
    assert second.num_cached == 8


@pytest.mark.parametrize("ended_early", [False, True])
def test_last_full_block_stays_in_the_prefix_cache(ended_early):
    scheduler = make_scheduler()
    sequence = add(scheduler, 1, range(8))
    plan = scheduler.schedule()
    if ended_early:
        scheduler.remove(sequence)
    finish(scheduler, plan)
    scheduler.remove(sequence)
    add(scheduler, 2, range(12))
    assert step(scheduler) == [(2, 8, 4, True)]


def test_prefix_is_shared_within_one_step():
    scheduler = make_scheduler(max_batch_tokens=100)
    first = add(scheduler, 1, [*range(8), 50])
    second = add(scheduler, 2, [*range(8), 60, 61])
    assert rows_of(scheduler.schedule()) == [(1, 0, 9, True), (2, 8, 2, True)]
    assert first.block_ids[:2] == second.block_ids[:2]


def test_siblings_wait_for_the_leaders_prompt_and_share_it():
    scheduler = make_scheduler(num_lanes=3)
    leader = add(scheduler, 1, range(20))
    for index in (1, 2):
        add(scheduler, 1 + index, range(20), leader=leader, index=index)
    add(scheduler, 4, 3)
    assert rows_of(scheduler.schedule()) == [(1, 0, 16, False)]
    assert rows_of(scheduler.schedule()) == [(1, 16, 4, True), (2, 16, 4, True), (3, 16, 4, True), (4, 0, 3, True)]


def test_siblings_do_not_wait_for_a_leader_that_is_gone():
    scheduler = make_scheduler(num_lanes=2)
    leader = add(scheduler, 1, range(20))
    add(scheduler, 2, range(20), leader=leader)
    scheduler.schedule()
    scheduler.remove(leader)
    assert rows_of(scheduler.schedule()) == [(2, 16, 4, True)]


def test_waiting_siblings_let_others_pass():
    scheduler = make_scheduler(order_key=lambda sequence: -sequence.seq_id)
    leader = add(scheduler, 1, 8)
    add(scheduler, 9, leader.prompt_tokens, leader=leader)
    assert rows_of(scheduler.schedule()) == [(1, 0, 8, True), (9, 4, 4, True)]


# ---- asking again


def test_repeat_computes_the_last_position_once_more():
    scheduler = make_scheduler()
    sequence = add(scheduler, 1, 5)
    (row,) = scheduler.complete(scheduler.schedule())
    scheduler.repeat(row.sequence)
    plan = scheduler.schedule()
    assert rows_of(plan) == [(1, 4, 1, True)]
    finish(scheduler, plan)
    assert sequence.output_tokens == [7]
    assert step(scheduler) == [(1, 5, 1, True)]


def test_position_that_may_be_repeated_is_not_shared_yet():
    """A repeat writes its position again, and nobody else may be reading there."""
    scheduler = make_scheduler(num_lanes=2)
    add(scheduler, 1, range(8))
    plan = scheduler.schedule()
    other = add(scheduler, 2, [*range(8), 50])
    assert rows_of(scheduler.schedule()) == [(2, 4, 5, True)]
    (row,) = scheduler.complete(plan)
    scheduler.repeat(row.sequence)
    (row,) = scheduler.schedule().rows
    assert (row.start, row.num_tokens) == (7, 1)
    assert not set(row.sequence.block_ids[1:]) & set(other.block_ids)


# ---- when blocks run out


def run_until_preemption(scheduler):
    while not scheduler.num_preemptions:
        step(scheduler)


def test_last_in_order_makes_room_and_goes_on_later_with_the_same_log():
    scheduler = make_scheduler(num_blocks=6)
    first, second = add(scheduler, 1, 8, max_tokens=12), add(scheduler, 2, 8, max_tokens=12)
    step(scheduler)
    run_until_preemption(scheduler)
    assert (first.slot is None, second.slot is None) == (False, True)
    assert second.incarnation == 1
    log = list(second.output_tokens)
    while first.num_tokens < first.token_limit:
        assert {row[0] for row in step(scheduler)} == {1}
    scheduler.remove(first)
    (row,) = scheduler.schedule().rows
    assert row.sequence is second
    assert row.start + row.num_tokens == second.num_tokens
    assert row.start > 0, "what is still in the prefix cache is not computed again"
    assert second.output_tokens == log
    assert second.num_cached == 0, "only the first admission counts"


def test_result_of_a_preempted_sequence_is_void():
    scheduler = make_scheduler(num_blocks=4, num_lanes=2)
    add(scheduler, 1, 7, max_tokens=9)
    second = add(scheduler, 2, 7, max_tokens=9)
    step(scheduler)  # positions 0 .. 6 of both
    plans = [scheduler.schedule(), scheduler.schedule()]  # position 7
    finish(scheduler, plans[0])
    plans.append(scheduler.schedule())  # position 8 of the first needs a block
    assert scheduler.num_preemptions == 1
    assert rows_of(plans[2]) == [(1, 8, 1, True)]
    assert second.slot is None
    assert scheduler.complete(plans[1]) == []
    assert second.output_tokens == [7]


def test_later_sequence_stalls_rather_than_preempt_an_earlier_one():
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, 1, 5, max_tokens=11)
    second = add(scheduler, 2, 7, max_tokens=9)
    step(scheduler)
    assert step(scheduler) == [(1, 5, 1, True), (2, 7, 1, True)]
    held = list(second.block_ids)
    assert step(scheduler) == [(1, 6, 1, True)], "the second one needs a block"
    assert step(scheduler) == [(1, 7, 1, True)]
    assert second.block_ids == held
    assert scheduler.num_preemptions == 0
    assert step(scheduler) == [(1, 8, 1, True)], "now the first one needs a block"
    assert second.slot is None


def test_sequence_whose_token_is_being_sampled_is_not_preempted():
    scheduler = make_scheduler(num_blocks=4, num_lanes=2)
    add(scheduler, 1, 7, max_tokens=9)
    second = add(scheduler, 2, 7, max_tokens=9)
    step(scheduler)
    plans = [scheduler.schedule(), scheduler.schedule()]
    (row,) = scheduler.complete(plans[1])
    finish(scheduler, plans[0])
    assert scheduler.schedule() is None, "the first one stalls"
    scheduler.append_token(row.sequence, 7)
    assert second.output_tokens == [7, 7]
    assert rows_of(scheduler.schedule()) == [(1, 8, 1, True)]
    assert scheduler.num_preemptions == 1


def test_newcomer_that_would_soon_be_preempted_is_not_admitted():
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, 1, 12, max_tokens=40)
    step(scheduler)
    newcomer = add(scheduler, 2, 4 * 12, max_tokens=4)  # needs 12 of the 13 blocks left; growing takes the last ones
    step(scheduler)
    assert newcomer.slot is None
    third = add(scheduler, 3, 2)
    step(scheduler)
    assert third.slot is None, "nobody behind it takes the blocks it waits for"


def test_lone_sequence_can_use_every_block():
    scheduler = make_scheduler(num_blocks=4)
    sequence = add(scheduler, 1, 2, max_tokens=14)
    while sequence.num_tokens < 16:
        step(scheduler)
    assert scheduler.num_preemptions == 0


# ---- when the pipeline is lost


def test_after_a_lost_pipeline_everything_is_computed_again_the_shortest_first():
    scheduler = make_scheduler(num_lanes=2, max_batch_tokens=100)
    first, second = add(scheduler, 1, 5), add(scheduler, 2, 5)
    step(scheduler)
    third = add(scheduler, 3, 5)
    late = scheduler.schedule()
    handed_out = scheduler.complete(late)
    assert handed_out
    lost = scheduler.schedule()
    scheduler.preempt_all()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_in_flight) == (0, 3, 0)
    plan = scheduler.schedule()
    assert rows_of(plan) == [(3, 0, 5, True), (1, 0, 6, True), (2, 0, 6, True)]
    assert all(update.first == 0 for update in plan.block_table_updates)
    assert lost is None or scheduler.complete(lost) == []
    assert scheduler.num_in_flight == 1
    finish(scheduler, plan)
    assert [len(sequence.output_tokens) for sequence in (first, second, third)] == [2, 2, 1]
    assert scheduler.num_preemptions == 0


# ---- what is refused at once


def test_higher_priority_is_admitted_first():
    scheduler = make_scheduler(max_running=1)
    add(scheduler, 1, 3)
    add(scheduler, 2, 3, priority=5)
    assert rows_of(scheduler.schedule()) == [(2, 0, 3, True)]


def test_higher_priority_prompt_overtakes_one_between_chunks():
    scheduler = make_scheduler()
    add(scheduler, 1, 40)
    step(scheduler)
    add(scheduler, 2, 10, priority=1)
    assert step(scheduler) == [(2, 0, 10, True), (1, 16, 6, False)]


def test_order_is_the_key_functions():
    scheduler = make_scheduler(max_running=1, order_key=lambda sequence: len(sequence.prompt_tokens))
    add(scheduler, 1, 9)
    add(scheduler, 2, 3)
    assert rows_of(scheduler.schedule()) == [(2, 0, 3, True)]


def test_full_queue_refuses_and_hints_when_to_come_back():
    scheduler = make_scheduler(max_running=2, max_waiting=1)
    for seq_id in range(3):
        add(scheduler, seq_id, 3)
    with pytest.raises(Overloaded) as refusal:
        add(scheduler, 3, 3)
    assert refusal.value.retry_after_s > 0
    assert (refusal.value.limit, refusal.value.retryable) == ("1", True)
    step(scheduler)
    with pytest.raises(Overloaded):
        add(scheduler, 4, 3)
    assert scheduler.num_running + scheduler.num_waiting == 3


def hint_s(scheduler, now_s):
    """When the next one is told to come again: the line is full."""
    with pytest.raises(Overloaded) as refusal:
        scheduler.check_room(1, now_s)
    return refusal.value.retry_after_s


def test_what_moves_to_another_pipeline_does_not_make_the_line_look_fast():
    lost, other = make_scheduler(max_running=1, max_waiting=4), make_scheduler()
    moving = [add(lost, seq_id, 3) for seq_id in range(5)]
    step(lost)
    hint_s(lost, 0.0)
    lost.preempt_all()
    for sequence in moving:
        other.adopt(sequence, lost.release(sequence))
    for seq_id in range(5, 10):
        add(lost, seq_id, 3)
    step(lost)
    assert hint_s(lost, WINDOW_S) == MAX_S, "nobody has finished here"


def test_what_comes_from_another_pipeline_does_not_make_the_line_look_slow():
    lost, other = make_scheduler(max_running=4), make_scheduler(max_running=1, max_waiting=0)
    moving = [add(lost, seq_id, 3) for seq_id in range(4)]
    step(lost)
    lost.preempt_all()
    busy = add(other, 4, 3)
    step(other)
    hint_s(other, 0.0)
    for sequence in moving:
        other.adopt(sequence, lost.release(sequence))
    for sequence in (busy, *moving[:3]):
        other.remove(sequence)
        step(other)
    assert hint_s(other, WINDOW_S) == WINDOW_S / 4, "four have begun, and nobody waits"


def test_free_slots_do_not_lengthen_the_queue_when_blocks_are_short():
    scheduler = make_scheduler(num_blocks=4, max_running=8, max_waiting=1)
    add(scheduler, 1, 12, max_tokens=4)
    step(scheduler)
    second = add(scheduler, 2, 12, max_tokens=4)
    step(scheduler)
    with pytest.raises(Overloaded):
        add(scheduler, 3, 3, max_tokens=4)
    scheduler.remove(second)
    for seq_id in (4, 5):
        add(scheduler, seq_id, 1, max_tokens=3)


@pytest.mark.parametrize(
    ("num_blocks", "prompt", "max_tokens", "field", "limit"),
    [
        (5, 20, None, "prompt", "19"),  # past the K/V cache of 20
        (5, 10, 11, "max_tokens", "10"),
        (1000, 49, 10_000, None, None),
        (5, 10, 10, None, None),
        (5, 10, None, None, None),
    ],
)
def test_what_can_never_fit_is_refused(num_blocks, prompt, max_tokens, field, limit):
    scheduler = make_scheduler(num_blocks=num_blocks, context_length=50)
    if field is None:
        sequence = add(scheduler, 1, prompt, max_tokens)
        assert prompt < sequence.token_limit <= min(50, 4 * num_blocks)
        return
    with pytest.raises(OutOfRange) as refusal:
        add(scheduler, 1, prompt, max_tokens)
    assert (refusal.value.field, refusal.value.limit, refusal.value.retryable) == (field, limit, False)
    assert scheduler.num_waiting == 0
