"""The real scheduler, paced by what it measures, on simulated pipelines."""

import pytest

from stagecoach_cli.load_figures import percentile
from tests.unit.router.pipeline_simulation import Simulation, stage_cost

# Two stages of a slow machine, of one where the weights dominate, and an uneven pair.
ROWS_COST = (stage_cost(0.008, 0.0035),) * 2
WEIGHTS_COST = (stage_cost(0.02, 0.00005, 0.00003),) * 2
UNEVEN = (stage_cost(0.010, 0.0015), stage_cost(0.020, 0.003))


def tokens_per_s(stages, hop_s, num_sequences, **options):
    """Of sequences that all decode."""
    simulation = Simulation(stages, hop_s, noise=0.1, **options)
    for _ in range(num_sequences):
        simulation.add(16, 4000)
    simulation.run_for(30)
    begin_s = simulation.now_s
    simulation.run_for(15)
    return simulation.tokens_between(begin_s, simulation.now_s) / (simulation.now_s - begin_s)


def test_far_machines_give_nearly_the_throughput_of_near_ones():
    assert tokens_per_s(ROWS_COST, 0.010, 32) >= 0.9 * tokens_per_s(ROWS_COST, 0.0, 32)


@pytest.mark.parametrize("stages", [ROWS_COST, WEIGHTS_COST, UNEVEN, (stage_cost(0.01, 0.001),) * 3])
@pytest.mark.parametrize("hop_s", [0.0, 0.01, 0.05])
def test_no_fixed_number_of_lanes_is_much_better(stages, hop_s):
    ours = tokens_per_s(stages, hop_s, 32)
    best = max(tokens_per_s(stages, hop_s, 32, lanes=lanes) for lanes in (1, 2, 3, 4, 6, 8))
    assert ours >= 0.92 * best


@pytest.mark.parametrize("hop_s", [0.0, 0.01, 0.05])
def test_one_sequence_pays_compute_and_hops_and_nothing_else(hop_s):
    stages = (stage_cost(0.01, 0.001), stage_cost(0.005, 0.001), stage_cost(0.02, 0.0))
    simulation = Simulation(stages, hop_s)
    sequence = simulation.add(16, 200)
    simulation.run()
    for gap_s in simulation.gaps_s([sequence.seq_id], 0.0, simulation.now_s):
        assert gap_s == pytest.approx(0.011 + 0.006 + 0.02 + 4 * hop_s)


def test_two_sequences_on_three_stages_do_not_wait_for_each_other():
    simulation = Simulation((stage_cost(0.01, 0.001),) * 3, 0.01)
    ids = [simulation.add(16, 500).seq_id for _ in range(2)]
    simulation.run_for(10)
    gaps_s = simulation.gaps_s(ids, 5.0, simulation.now_s)
    assert percentile(gaps_s, 50) <= 1.05 * (3 * 0.011 + 4 * 0.01)


def test_a_slow_stage_is_kept_busy():
    """It computes 32 rows at two fixed costs at best; what the others take is hidden."""
    assert tokens_per_s(UNEVEN, 0.01, 32) >= 0.9 * 32 / (2 * 0.020 + 32 * 0.003)


def test_a_stage_that_becomes_slow_is_noticed():
    simulation = Simulation((stage_cost(0.004, 0.002),) * 2, 0.03)
    for _ in range(32):
        simulation.add(16, 6000)
    simulation.run_for(20)
    before = simulation.scheduler.num_lanes
    simulation.stages[1] = stage_cost(0.08, 0.004)
    simulation.run_for(120)
    assert simulation.scheduler.num_lanes < before


def test_without_timings_it_runs_as_many_lanes_as_stages_and_a_spare_chunk_while_there_are_only_prompts():
    simulation = Simulation(ROWS_COST, 0.05, timed=False)
    for _ in range(8):
        simulation.add(128, 100)
    simulation.run()
    assert set(simulation.lanes_seen) == {2, 3}


@pytest.mark.parametrize("hop_s", [0.0, 0.01])
@pytest.mark.parametrize("num_streams", [1, 8, 32])
@pytest.mark.parametrize(
    "stages",
    [
        (stage_cost(0.017, 0.0022, 0.0011, 1e-6, 1e-7),) * 2,
        (stage_cost(0.008, 0.0011, 0.0004, 1e-6, 1e-7),) * 2,
        (stage_cost(0.02, 0.00005, 0.00003),) * 2,
    ],
)
def test_a_long_prompt_neither_stalls_the_streams_beside_it_nor_starves(stages, num_streams, hop_s):
    simulation = Simulation(stages, hop_s, noise=0.1)
    alone = [simulation.add(4096, 1).seq_id]
    simulation.run()
    alone_s = simulation.arrivals[alone[0]][0]
    streams = [simulation.add(128, 4000).seq_id for _ in range(num_streams)]
    simulation.run_for(20)
    begin_s = simulation.now_s
    simulation.run_for(20)
    quiet_s = simulation.gaps_s(streams, begin_s, simulation.now_s)
    sent_s = simulation.now_s
    prompt = simulation.add(4096, 8).seq_id
    simulation.run(lambda: bool(simulation.arrivals[prompt]))
    beside_s = simulation.gaps_s(streams, sent_s, simulation.now_s)
    assert percentile(beside_s, 99) <= 2.5 * percentile(quiet_s, 99)
    assert simulation.now_s - sent_s <= 2.2 * alone_s


@pytest.mark.parametrize("num_requests", [8, 32])
def test_a_burst_of_short_prompts_is_through_as_soon_as_without_protection(num_requests):
    def burst_s(timed):
        simulation = Simulation((stage_cost(0.008, 0.0011, 0.0004),) * 2, 0.002, noise=0.1, timed=timed)
        for _ in range(3):
            begin_s = simulation.now_s
            for _ in range(num_requests):
                simulation.add(128, 64)
            simulation.run()
        return simulation.now_s - begin_s

    assert burst_s(timed=True) <= 1.05 * burst_s(timed=False)
