"""The commands against a scripted router, over real gRPC."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from stagecoach.errors import OutOfRange, ShardFault
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_cli import run
from tests.integration.fake_router import MODEL, FakeRouter, counting, serving, stage, words

COMMAND = [sys.executable, "-c", "from stagecoach_cli import main; main()"]


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def target(router: FakeRouter) -> Iterator[str]:
    with serving(router) as address:
        yield address


def test_generate_prints_the_answer(router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--max-tokens",
        "3",
        "--temperature",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--seed",
        "7",
        "--priority",
        "2",
    ]
    assert run(["generate", "Say hello", "--target", target, *arguments]) == 0
    assert capfd.readouterr().out == "Hello, world\n"
    request = router.requests[0]
    assert (request.prompt, request.priority) == ("Say hello", 2)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (3, 0.0, 7)
    assert list(request.sampling.stop) == ["a", "b"]


def test_generate_reads_standard_input(router: FakeRouter, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run(["generate", "-", "--chat", "--target", target]) == 0
    assert router.requests[0].chat.messages[0].content == "two\nlines"


def test_standard_input_that_is_not_text_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 x"), encoding="utf-8"))
    assert run(["generate", "-"]) == 1
    assert capfd.readouterr().err.startswith("error: standard input is not utf-8: ")


def test_an_error_after_some_text_begins_a_line(
    router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield next(words(request))
        raise ShardFault("stage 1")

    router.answer = broken
    assert run(["generate", "x", "--target", target]) == 1
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("Hello\n", "error: stage 1\n")


def test_generate_takes_token_ids_and_prints_json(
    router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--token-ids", "5,6", "--json", "--n", "2", "--target", target]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert [completion["token_ids"] for completion in answer["completions"]] == [[1, 2, 3]] * 2
    assert answer["usage"]["prompt_tokens"] == 5
    assert list(router.requests[0].token_ids.ids) == [5, 6]


def test_generate_prints_several_completions(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "x", "--n", "2", "--target", target]) == 0
    assert capfd.readouterr().out == "--- 0 (length)\nHello, world\n--- 1 (length)\nHello, world\n"


def test_an_error_of_the_server_is_one_line_with_its_facts(
    router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    router.failures.append(OutOfRange("too many tokens", field="prompt", limit=512, value=600))
    assert run(["generate", "x", "--target", target]) == 1
    assert capfd.readouterr().err == "error: too many tokens (field prompt, limit 512)\n"


def test_no_server_is_a_clear_error(capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["bench"], ["chat"], ["generate", "x"]):
        assert run([*command, "--target", "127.0.0.1:1"]) == 1
        written = capfd.readouterr().err
        assert written.startswith("error: 127.0.0.1:1: ")
        assert written.count("\n") == 1


def test_status_shows_the_stages(router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--target", target]) == 0
    shown = capfd.readouterr().out
    for text in (
        "tiny: ready",
        "10:30",
        "127.0.0.1:50061",
        "bfloat16",
        "4242",
        "node-a",
        "75%",
        "25%",
        "since the router started: sequences ran for 4.0 s, prefix hits 20%",
        "9 of 9",
        "3.0 MiB",
        "2 running",
    ):
        assert text in shown
    router.ready = False
    assert run(["status", "--target", target]) == 1
    assert "not ready: layers 10:20 are missing" in capfd.readouterr().out


def test_status_of_a_cluster_that_lost_one_of_two_pipelines(
    router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = pb.PipelineStatus(model=MODEL, epoch=4, reason="127.0.0.1:7 does not answer", num_waiting=3)
    lost.stages.extend([stage(0, 10), stage(10, 30)])
    serving = pb.PipelineStatus(model=MODEL, epoch=1, ready=True, num_running=5, stages=[stage(5, 30)])
    serving.stages.append(stage(10, 30))  # taken from the lost one
    spares = [
        pb.SpareStatus(address="127.0.0.1:8", assignable=True),
        pb.SpareStatus(address="127.0.0.1:9", layers=model_pb2.LayerRange(start=0, end=10)),
        pb.SpareStatus(address="127.0.0.1:10", reason="127.0.0.1:10: dtype: float16, not bfloat16"),
    ]
    router.status = pb.GetClusterStatusResponse(pipelines=[serving, lost], spares=spares, active_s=4.0)
    assert run(["status", "--target", target]) == 0
    shown = capfd.readouterr().out
    assert "1 of 2 pipelines serves\npipeline 1 does not serve: 127.0.0.1:7 does not answer\n" in shown
    assert "pipeline 0, tiny: ready (epoch 1; 5 running, 0 waiting)" in shown
    assert "pipeline 1, tiny: not ready: 127.0.0.1:7 does not answer (epoch 4; 0 running, 3 waiting)" in shown
    rows = [[cell.strip() for cell in line.split("\u2502")] for line in shown.splitlines()]
    assert ["", "127.0.0.1:8", "none yet", "not assigned", ""] in rows
    assert ["", "127.0.0.1:9", "0:10", "ready", ""] in rows
    assert ["", "127.0.0.1:10", "none yet", "dtype: float16, not bfloat16", ""] in rows
    stages = [row[1:4] for row in rows if "9 of 9" in row]
    assert stages == [["0", "0", "5:30"], ["0", "1", "10:30"], ["1", "0", "0:10"]]
    assert shown.count("(now in pipeline 0)") == 1

    serving.ready = False
    router.status = pb.GetClusterStatusResponse(pipelines=[serving, lost])
    assert run(["status", "--target", target]) == 1
    assert "0 of 2 pipelines serve\npipeline 0 does not serve: no reason given\n" in capfd.readouterr().out


def test_status_as_json(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--json", "--target", target]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["pipelines"][0]["stages"][1]["first_layer"] == 10
    assert shown["activity"]["stages"][1]["bubble_fraction"] == 0.25


def test_status_of_an_interval_shows_what_was_done_in_it(
    router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", "--target", target, "--interval", "0.01"]) == 0
    shown = capfd.readouterr().out
    assert "in 0.01 s: sequences ran for 0.0 s, prefix hits -" in shown
    assert "75%" not in shown  # that was before
    assert len(router.requests) == 2


def test_bench_measures_and_writes_json(
    router: FakeRouter, target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    router.answer = counting
    file = tmp_path / "bench.json"
    options = [
        "--concurrency",
        "1,3",
        "--prompt-tokens",
        "20",
        "--output-tokens",
        "16",
        "--seed",
        "5",
        "--json",
        str(file),
    ]
    assert run(["bench", "--target", target, *options, "--requests-per-client", "2"]) == 0
    shown = capfd.readouterr().out
    assert "decode tok/s" in shown
    report = json.loads(file.read_text())
    assert [(r["concurrency"], r["num_requests"], r["generated_tokens"]) for r in report["results"]] == [
        (1, 2, 32),
        (3, 6, 96),
    ]
    for result in report["results"]:
        assert result["e2e_tokens_per_s"] == pytest.approx(result["generated_tokens"] / result["wall_s"])
        assert 0 < result["ttft_s"]["p50"] <= result["ttft_s"]["p99"]
        done = result["activity"]
        assert [stage["layers"] for stage in done["stages"]] == ["0:10", "10:30"]
        assert set(report["definitions"]) <= {*result, *done, *done["stages"][0]}
    sent = [request for request in router.requests if request.DESCRIPTOR.name == "GenerateRequest"]
    prompts = [tuple(request.token_ids.ids) for request in sent]
    assert len(set(prompts)) == len(prompts) == 2 + 6 + 1 + 3  # the runs' and their warm-ups'; no two alike
    assert all(len(prompt) == 20 and max(prompt) < 100 for prompt in prompts)
    assert all(request.sampling.ignore_eos and request.sampling.temperature == 0 for request in sent)


def test_bench_refuses_what_does_not_fit_the_context(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--target", target, "--prompt-tokens", "500", "--output-tokens", "13"]) == 1
    assert "limit 512" in capfd.readouterr().err


def test_bench_says_when_answers_are_too_short(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--target", target, "--concurrency", "2", "--no-warmup"]) == 1
    assert "asked for 64 tokens and got 3" in capfd.readouterr().err


def test_chat_keeps_the_conversation(router: FakeRouter, target: str) -> None:
    result = subprocess.run(
        [*COMMAND, "chat", "--target", target],
        input="hi\n\nmore\n/exit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("Hello, world") == 2
    assert [message.content for message in router.requests[2].chat.messages] == ["hi", "Hello, world", "more"]


def test_ctrl_c_stops_the_answer_but_not_the_chat(router: FakeRouter, target: str) -> None:
    router.stay_open = True
    chat = subprocess.Popen(
        [sys.executable, "-u", *COMMAND[1:], "chat", "--target", target],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with ended(chat):
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("hi\n")
        chat.stdin.flush()
        while "world" not in (shown := read_word(chat.stdout)):
            assert shown
        chat.send_signal(signal.SIGINT)
        assert router.caller_left.wait(10)
        rest, errors = chat.communicate("/exit\n", timeout=20)
    assert "[stopped]" in rest
    assert (chat.returncode, errors) == (0, "")


def test_ctrl_c_ends_generate_with_130(router: FakeRouter, target: str) -> None:
    router.stay_open = True
    generate = subprocess.Popen(
        [*COMMAND, "generate", "x", "--target", target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with ended(generate):
        assert generate.stdout is not None
        while "world" not in (shown := read_word(generate.stdout)):
            assert shown
        generate.send_signal(signal.SIGINT)
        _, errors = generate.communicate(timeout=20)
    assert (generate.returncode, errors) == (130, "")
    assert router.caller_left.wait(10)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """At the end it is, however the test went."""
    with process:
        try:
            yield
        finally:
            process.kill()


def read_word(stream: IO[str]) -> str:
    """Up to the next space, line end or comma: an answer has no line end while it runs."""
    word = ""
    while (letter := stream.read(1)) and letter not in " \n,":
        word += letter
        if word == "world":
            break
    return word or letter
