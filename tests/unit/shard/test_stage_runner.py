"""The compute thread: in order, one fault at a time, with counters that add up and a sign of life."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import AttentionShape
from stagecoach_shard.attention.sdpa import SdpaAttention, SdpaStep
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.load_meter import Load, StepTimes
from stagecoach_shard.runtime.outputs import Output, WantedOutput
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.stage_runner import (
    StageInput,
    StageResult,
    StageRunner,
)
from tests.unit.shard.stage_chain import CPU
from tests.unit.shard.tiny_models import MODELS, VOCAB_SIZE, reference_logits, save_tiny_model

BLOCK_SIZE, NUM_BLOCKS, TIMEOUT_S = 4, 8, 20.0
TOKEN_IDS = [5, 60, 31, 7]
Answer = StageResult | BaseException | None


def make_batch(num_tokens: int) -> Batch:
    """One row from the first position on."""
    return Batch.build(
        starts=np.array([0]),
        num_tokens=np.array([num_tokens]),
        block_tables=np.array([[3, 1]], dtype=np.int32),
        block_size=BLOCK_SIZE,
    )


class Scripted(SdpaAttention):
    """Attention that does what it was told to before each micro-batch is planned."""

    def __init__(self) -> None:
        self.before: Callable[[Batch], None] = lambda batch: None

    def prepare(self, batch: Batch, shape: AttentionShape, dtype: torch.dtype) -> SdpaStep:
        self.before(batch)
        return super().prepare(batch, shape, dtype)


class Scene:
    """A runner over a small stage, and what it answered, in order."""

    def __init__(self, checkpoint: Checkpoint, layers: LayerRange) -> None:
        self.attention = Scripted()
        stage = Stage.load(checkpoint, layers, dtype=torch.float32, device=CPU, attention=self.attention)
        cache = KVCache.allocate(
            checkpoint.config, layers, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
        )
        self.runner = StageRunner(stage, cache, num_threads=1)
        self._answers: queue.SimpleQueue[tuple[str, Answer, StepTimes]] = queue.SimpleQueue()

    def submit(
        self,
        name: str,
        token_ids: list[int] = TOKEN_IDS,
        *,
        outputs: tuple[WantedOutput, ...] = (),
        is_current: Callable[[], bool] = lambda: True,
        lease: Load | None = None,
    ) -> None:
        inputs = torch.tensor(token_ids, dtype=torch.int32)
        step = StageInput(inputs, make_batch(len(token_ids)), outputs, is_current, lease or Load())
        self.runner.submit(step, lambda answer, times: self._answers.put((name, answer, times)))

    @property
    def load(self) -> Load:
        """The stage's, as of now."""
        return self.runner.meter.read(Load())[0]

    def load_of(self, lease: Load) -> Load:
        """The lease's, as of now."""
        return self.runner.meter.read(lease)[1]

    def answer(self, name: str) -> Answer:
        """The next answer, which must be that of `name`."""
        return self.timed_answer(name)[0]

    def timed_answer(self, name: str) -> tuple[Answer, StepTimes]:
        """The same with its times."""
        given, answer, times = self._answers.get(timeout=TIMEOUT_S)
        assert given == name
        return answer, times


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, torch.Tensor]:
    """A checkpoint, and what transformers says of TOKEN_IDS."""
    folder: Path = tmp_path_factory.mktemp("llama")
    model = save_tiny_model(folder, MODELS["llama"])
    return open_checkpoint(folder), reference_logits(model, TOKEN_IDS)


@pytest.fixture
def scene(tiny: tuple[Checkpoint, torch.Tensor]) -> Iterator[Scene]:
    """A runner of the whole model, started; its thread is ended afterwards."""
    threads = torch.get_num_threads()
    scene = Scene(tiny[0], LayerRange(0, 4))
    scene.runner.start()
    yield scene
    scene.runner.stop()
    torch.set_num_threads(threads)


def test_steps_run_first_in_first_out(scene: Scene) -> None:
    begun: list[int] = []
    scene.attention.before = lambda batch: begun.append(batch.total_tokens)
    for index, count in enumerate((3, 1, 4, 2, 1, 3)):
        scene.submit(f"step {index}", TOKEN_IDS[:count])
    for index in range(6):
        assert scene.answer(f"step {index}") == []
    assert begun == [3, 1, 4, 2, 1, 3]


def test_the_last_stage_answers_with_the_outputs_that_were_asked_for(
    scene: Scene, tiny: tuple[Checkpoint, torch.Tensor]
) -> None:
    expected = tiny[1]
    whole = WantedOutput(torch.tensor([3, 0]), 0, None)
    three = WantedOutput(torch.tensor([2]), 3, torch.tensor([0.5]))
    scene.submit("step", outputs=(whole, three))
    outputs = scene.answer("step")
    assert isinstance(outputs, list)
    rows, candidates = outputs
    assert isinstance(rows, Output)
    assert rows.token_ids is None
    torch.testing.assert_close(rows.logits, expected[[3, 0]], atol=1e-4, rtol=0)
    token_ids, values, plain, scaled = candidates.arrays
    assert (tuple(token_ids.shape), tuple(values.shape)) == ((1, 3), (1, 3))
    assert token_ids[0].tolist() == expected[2].topk(3).indices.tolist()
    torch.testing.assert_close(values[0], expected[2].topk(3).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain[0], expected[2].logsumexp(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled[0], (expected[2] / 0.5).logsumexp(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_more_logits_than_there_may_be_at_a_time_come_in_runs_and_are_the_same(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    wanted = (
        WantedOutput(torch.tensor([3, 0]), 0, None),
        WantedOutput(torch.tensor([2]), 3, torch.tensor([0.5])),
        WantedOutput(torch.tensor([1, 2, 3, 0]), 2, torch.tensor([1.0, 0.0, 0.5, 2.0])),
        WantedOutput(torch.tensor([1]), 1, None),
    )
    scene.submit("at once", outputs=wanted)
    at_once = scene.answer("at once")
    seen: list[int] = []
    compute = Stage.logits

    def logits(stage: Stage, hidden_states: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_states))
        return compute(stage, hidden_states)

    monkeypatch.setattr(Stage, "logits", logits)
    monkeypatch.setattr("stagecoach_shard.runtime.outputs._MAX_LOGITS_BYTES", max_rows * 4 * VOCAB_SIZE)
    scene.submit("in runs", outputs=wanted)
    in_runs = scene.answer("in runs")
    assert (max(seen), sum(seen)) == (max_rows, 8)
    assert isinstance(at_once, list)
    assert isinstance(in_runs, list)
    for one, other in zip(at_once, in_runs, strict=True):
        for expected, array in zip(one.arrays, other.arrays, strict=True):
            torch.testing.assert_close(array, expected, atol=1e-4, rtol=0)


def test_other_stages_answer_with_hidden_states(tiny: tuple[Checkpoint, torch.Tensor]) -> None:
    scene = Scene(tiny[0], LayerRange(0, 2))
    scene.runner.start()
    scene.submit("step")
    states = scene.answer("step")
    scene.runner.stop()
    assert isinstance(states, torch.Tensor)
    assert (list(states.shape), states.device) == ([4, tiny[0].config.hidden_size], CPU)


def fail(batch: Batch) -> None:
    raise RuntimeError("no luck")


def test_a_step_that_fails_is_told_and_the_next_one_runs(scene: Scene) -> None:
    scene.attention.before = lambda batch: fail(batch) if batch.total_tokens == 2 else None
    scene.submit("good")
    scene.submit("bad", TOKEN_IDS[:2])
    scene.submit("good again")
    assert scene.answer("good") == []
    error = scene.answer("bad")
    assert isinstance(error, RuntimeError)
    assert str(error) == "no luck"
    assert scene.answer("good again") == []
    assert scene.runner.alive
    assert scene.load.num_steps == 2


def test_a_result_that_cannot_be_given_back_ends_nothing(scene: Scene) -> None:
    def gone(answer: Answer, times: StepTimes) -> None:
        raise RuntimeError("the event loop is closed")

    scene.runner.submit(StageInput(torch.tensor([1]), make_batch(1), (), lambda: True), gone)
    scene.submit("next")
    assert scene.answer("next") == []
    assert scene.runner.alive


def test_a_step_whose_lease_has_ended_is_not_computed(scene: Scene) -> None:
    begun: list[int] = []
    scene.attention.before = lambda batch: begun.append(batch.total_tokens)
    scene.submit("ended", is_current=lambda: False)
    scene.submit("good")
    assert scene.answer("ended") is None
    assert scene.answer("good") == []
    assert len(begun) == scene.load.num_steps == 1


def test_whether_a_lease_stands_is_asked_when_its_turn_comes(scene: Scene) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(batch: Batch) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT_S)

    scene.attention.before = hold
    stands = True
    scene.submit("first")
    scene.submit("second", is_current=lambda: stands)
    assert begun.wait(TIMEOUT_S)
    assert scene.load.queue_depth == 1
    seen = [scene.load for _ in range(2)]
    assert 0 < seen[0].compute_s < seen[1].compute_s  # also of the step in hand
    assert seen[0].wait_s == seen[1].wait_s
    stands = False
    go_on.set()
    assert scene.answer("first") == []
    assert scene.answer("second") is None
    assert scene.load.queue_depth == 0


def test_the_counters_add_up(scene: Scene) -> None:
    for count in (4, 1, 2):
        scene.submit("step", TOKEN_IDS[:count])
        scene.answer("step")
    scene.submit("ended", is_current=lambda: False)
    scene.answer("ended")
    scene.attention.before = fail
    scene.submit("bad")
    assert isinstance(scene.answer("bad"), RuntimeError)
    load = scene.load
    assert (load.num_steps, load.num_tokens) == (3, 7)
    assert load.compute_s > 0
    assert load.wait_s > 0


def test_the_times_of_steps_are_the_counters_parts(scene: Scene) -> None:
    held = threading.Event()

    def hold(batch: Batch) -> None:
        assert held.wait(TIMEOUT_S)

    scene.attention.before = hold
    scene.submit("first")
    scene.submit("second")
    held.set()
    times = [scene.timed_answer(name)[1] for name in ("first", "second")]
    assert times[1].queue_s > 0  # behind the first one
    load = scene.load
    assert sum(one.queue_s for one in times) == pytest.approx(load.queue_s)
    assert sum(one.compute_s for one in times) == pytest.approx(load.compute_s)


def test_each_leases_figures_are_of_its_own_steps(scene: Scene) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(batch: Batch) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT_S)

    ours, theirs = Load(), Load()
    scene.attention.before = hold
    scene.submit("theirs", lease=theirs)
    scene.submit("ours", lease=ours)
    scene.submit("more of ours", lease=ours)
    assert begun.wait(TIMEOUT_S)
    assert scene.load_of(ours) == Load(queue_depth=2)
    seen = [scene.load_of(theirs) for _ in range(2)]
    assert 0 < seen[0].compute_s < seen[1].compute_s  # also of the step in hand
    assert (seen[1].num_steps, seen[1].queue_depth) == (0, 0)
    go_on.set()
    times = {name: scene.timed_answer(name)[1].compute_s for name in ("theirs", "ours", "more of ours")}
    after = [scene.load_of(lease) for lease in (ours, theirs)]
    assert [(load.num_steps, load.queue_depth) for load in after] == [(2, 0), (1, 0)]
    assert after[0].compute_s == pytest.approx(times["ours"] + times["more of ours"])
    assert after[1].compute_s == pytest.approx(times["theirs"])
    assert sum(load.compute_s for load in after) == pytest.approx(scene.load.compute_s)


def test_a_lost_device_fails_every_later_step_and_shows(scene: Scene) -> None:
    def lose(batch: Batch) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    scene.attention.before = lose
    scene.submit("first")
    assert isinstance(scene.answer("first"), torch.AcceleratorError)
    assert not scene.runner.alive
    scene.attention.before = lambda batch: None
    scene.submit("second")
    assert isinstance(scene.answer("second"), torch.AcceleratorError)
    assert scene.load.num_steps == 0


def test_it_is_alive_from_start_to_stop_and_answers_what_was_queued(tiny: tuple[Checkpoint, torch.Tensor]) -> None:
    scene = Scene(tiny[0], LayerRange(0, 4))
    assert not scene.runner.alive
    scene.submit("early")
    assert scene.load.queue_depth == 1
    scene.runner.start()
    assert scene.runner.alive
    scene.submit("late")
    assert scene.runner.stop()
    assert not scene.runner.alive
    assert scene.answer("early") == []
    assert scene.answer("late") == []
