"""How the scheduler shares prefill among the lanes, and how many rows of logits a step may bring back."""

from stagecoach_router.scheduling.pacing import NO_PROMPTS, Pace
from tests.unit.router.test_scheduler import add, finish, make_scheduler, rows_of


def chunks(scheduler):
    """The tokens of each step that can leave now, one step in flight at a time."""
    sizes = []
    while (plan := scheduler.schedule()) is not None and not any(row.wants_logits for row in plan.rows):
        sizes.append(plan.num_tokens)
        scheduler.complete(plan)
    return [*sizes, plan.num_tokens]


def test_a_lone_prompt_is_spread_over_the_lanes_in_shrinking_chunks():
    scheduler = make_scheduler(num_blocks=400, num_lanes=2, max_batch_tokens=512)
    add(scheduler, 1, 640)
    sizes = chunks(scheduler)
    assert sizes[:3] == [160, 120, 90], "a quarter of what is left, so that two stages soon work at once"
    assert sum(sizes) == 640
    assert min(sizes[:-1]) == 64


def test_with_one_lane_or_a_short_prompt_nothing_is_spread():
    one_lane = make_scheduler(num_blocks=400, num_lanes=1, max_batch_tokens=512)
    add(one_lane, 1, 512)
    assert chunks(one_lane) == [512]
    short = make_scheduler(num_blocks=400, num_lanes=4, max_batch_tokens=512)
    add(short, 1, 60)
    assert chunks(short) == [60]


def test_prompts_that_fill_all_lanes_go_in_whole_budgets():
    scheduler = make_scheduler(num_blocks=400, num_lanes=2, max_batch_tokens=128)
    for seq_id in range(1, 10):
        add(scheduler, seq_id, 128)
    assert [scheduler.schedule().num_tokens for _ in range(2)] == [128, 128]


def test_a_step_wants_no_more_rows_of_logits_than_fit_a_message():
    scheduler = make_scheduler(max_logit_rows=2, num_lanes=1, max_batch_tokens=64)
    sequences = [add(scheduler, seq_id, 4, max_tokens=6) for seq_id in range(1, 6)]
    while any(len(sequence.output_tokens) < 6 for sequence in sequences):
        plan = scheduler.schedule()
        assert sum(wants_logits for *_, wants_logits in rows_of(plan)) <= 2
        finish(scheduler, plan)
        for sequence in sequences:
            if len(sequence.output_tokens) == 6 and not sequence.removed:
                scheduler.remove(sequence)
    assert all(len(sequence.output_tokens) == 6 for sequence in sequences)


def test_a_sibling_takes_over_the_digests_of_the_prompt_and_no_others():
    scheduler = make_scheduler(num_lanes=1, max_batch_tokens=64)
    leader = add(scheduler, 1, 10)
    follower = add(scheduler, 2, leader.prompt_tokens, leader=leader)
    for _ in range(6):
        finish(scheduler, scheduler.schedule(), token=leader.seq_id)
    assert follower.digests[:2] == leader.digests[:2]
    assert follower.num_cached == 8


def test_prompts_are_not_starved_by_decodes_that_fill_the_rows_of_logits():
    scheduler = make_scheduler(max_logit_rows=2, num_lanes=1, max_batch_tokens=64, num_blocks=400)
    for seq_id in range(1, 5):
        add(scheduler, seq_id, 4, max_tokens=40)
    while scheduler.num_running < 4 or scheduler.num_waiting:
        finish(scheduler, scheduler.schedule())
    for _ in range(4):
        finish(scheduler, scheduler.schedule())
    late = add(scheduler, 9, 8)
    for _ in range(3):
        finish(scheduler, scheduler.schedule())
    assert late.output_tokens


def test_a_newcomer_that_waited_for_blocks_is_paced_like_any_other():
    """What can start counts as a prompt again as soon as blocks are released, not only after it was admitted."""
    scheduler = make_scheduler(num_blocks=8, max_batch_tokens=64)
    first = add(scheduler, 1, 24, max_tokens=4)
    finish(scheduler, scheduler.schedule())
    add(scheduler, 2, 24, max_tokens=4)
    finish(scheduler, scheduler.schedule())
    assert scheduler.num_waiting == 1
    assert len(scheduler._admission.starting()) == 0, "it lacks blocks"
    scheduler.remove(first)
    assert len(scheduler._admission.starting()) == 1


def test_what_a_sequence_finds_again_in_the_prefix_cache_is_no_prefill():
    """A sequence that was let go of and comes back is paced by what is left to compute of it."""
    asked = []

    class Watched:
        def pace(self, num_decodes, prompts=NO_PROMPTS):
            asked.append(prompts)
            return Pace(2, 1)

    scheduler = make_scheduler(num_blocks=64, max_batch_tokens=64, pacing=Watched())
    sequence = add(scheduler, 1, 41, max_tokens=20)
    while not sequence.output_tokens:
        finish(scheduler, scheduler.schedule())
    assert max(prompts.num_tokens for prompts in asked) == 41
    scheduler.adopt(sequence, scheduler.release(sequence))
    scheduler.schedule()
    asked.clear()
    scheduler.schedule()
    assert asked[-1].num_tokens == 42 - 40


def test_others_get_steps_while_a_long_suspect_is_on_trial():
    """A trial of a long log takes many steps, and is made in turns, in which nobody else has a row."""
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=8, max_running=4)
    suspect = add(scheduler, 1, 800, max_tokens=20)
    scheduler.schedule()
    for _ in range(2):
        suspect.lost_pipeline(alone=False)
    scheduler.preempt_all()
    other = add(scheduler, 2, 4, max_tokens=900)
    longest = num_steps = num_computed = 0
    while suspect.is_suspect:
        plan = scheduler.schedule()
        assert len(plan.rows) == 1, "never both"
        longest = longest + 1 if plan.rows[0].sequence is suspect else 0
        num_computed += plan.rows[0].num_tokens * (plan.rows[0].sequence is suspect)
        num_steps += 1
        assert longest <= 64
        for row in scheduler.complete(plan):
            row.sequence.got_token()
            scheduler.append_token(row.sequence, 7)
    assert num_steps > 100
    assert len(other.output_tokens) >= 40
    assert num_computed <= 810, "what was computed is not computed again"
