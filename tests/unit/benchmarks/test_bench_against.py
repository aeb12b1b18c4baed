"""How a comparison is run and summed up, and how another engine is spoken to."""

from __future__ import annotations

import sys

import pytest

from benchmarks.against_llamacpp import main as against_llamacpp
from benchmarks.against_llamacpp import read_table
from benchmarks.against_vllm import main as against_vllm
from benchmarks.comparison import Figures, run_in_turn, summarize
from benchmarks.peer_process import PeerProcess
from stagecoach.errors import ConfigError, Unavailable

TABLE = """
main: n_kv_max = 8192, n_batch = 2048
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |     64 |    8 |   1536 |    0.500 |  2048.00 |    1.500 |   341.33 |    2.000 |   768.00 |

llama_perf_context_print: load time = 1 ms
"""
ANSWERING = "print('READY', flush=True)\nwhile line := input(): print('noise'); print('RESULT 0.5 2.0', flush=True)"


class Recorded:
    """An engine that notes when it is asked."""

    def __init__(self, name: str, e2e: list[float], calls: list[tuple[str, int]]) -> None:
        self.name, self.e2e, self.calls = name, e2e, calls

    def run(self, concurrency: int) -> Figures:
        self.calls.append((self.name, concurrency))
        return Figures(100.0, self.e2e[len([name for name, _ in self.calls if name == self.name]) - 1])

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...


def test_sides_take_turns_and_the_warm_up_does_not_count():
    calls: list[tuple[str, int]] = []
    engines = {name: Recorded(name, [0.0, 10.0, 20.0], calls) for name in ("stagecoach", "peer")}
    measured = run_in_turn(engines, [8], rounds=2)
    assert calls == [("stagecoach", 8), ("peer", 8)] * 3
    assert [run.e2e_tokens_per_s for run in measured[8]["peer"]] == [10.0, 20.0]


def test_ratios_are_ours_over_theirs_round_by_round():
    ours, theirs = [Figures(10, 30), Figures(10, 10)], [Figures(20, 10), Figures(20, 20)]
    [mine, peer] = summarize({8: {"stagecoach": ours, "peer": theirs}})
    assert "e2e_ratio" not in mine
    assert peer["e2e_ratio"] == {"median": 1.75, "min": 0.5, "max": 3.0, "rounds": [3.0, 0.5]}
    assert peer["prefill_ratio"]["median"] == 0.5
    assert peer["e2e_tokens_per_s"]["rounds"] == [10, 20]


def test_llama_cpps_table_is_read():
    assert read_table(TABLE) == Figures(prefill_tokens_per_s=2048.0, e2e_tokens_per_s=64 * 8 / 2.0)


def test_output_without_a_table_is_an_error():
    with pytest.raises(Unavailable, match="no row of figures"):
        read_table("| not | a | table |\n")


def test_a_peer_answers_in_seconds_and_what_else_it_prints_does_not_matter():
    with PeerProcess("peer", [sys.executable, "-c", ANSWERING]) as peer:
        assert peer.run(4) == Figures(prefill_tokens_per_s=4 * 128 / 0.5, e2e_tokens_per_s=4 * 64 / 2.0)
        assert peer.run(8).e2e_tokens_per_s == 8 * 64 / 2.0


def test_a_peer_that_ends_says_its_last_lines():
    script = "print('READY', flush=True); input(); raise SystemExit('out of memory')"
    with PeerProcess("peer", [sys.executable, "-c", script]) as peer, pytest.raises(Unavailable, match="out of memory"):
        peer.run(1)


def test_a_peer_that_cannot_start_says_why():
    with (
        pytest.raises(Unavailable, match="no such engine"),
        PeerProcess("peer", [sys.executable, "-c", "raise SystemExit('no such engine')"]),
    ):
        pytest.fail("it did not start")


@pytest.mark.parametrize(("main", "field"), [(against_vllm, "python"), (against_llamacpp, "build")])
def test_a_peer_has_to_be_named(main, field, tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(ConfigError) as caught:
        main(["--model", str(tmp_path)])
    assert caught.value.field == field
