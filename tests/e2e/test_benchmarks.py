"""Every benchmark once, at a size of seconds: figures of such a run mean nothing, but the run shows that it works.

vLLM and llama.cpp are not installed here: small stand-ins take their place, so that everything but them is run.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import profiled_router
from tests.unit.benchmarks.test_bench_modules import BENCHMARKS

# A context as long as benchmarks need it, for the tiny model.
CONTEXT_LENGTH = 8192
SIZES = {
    "against_llamacpp": "--stages 1 --concurrency 1",
    "against_transformers": "--stages 1 --concurrency 1 --threads 1",
    "against_vllm": "--stages 1 --concurrency 1",
    "far_machines": "--stages 1 --delays-ms 0,1 --concurrency 2 --output-tokens 8",
    "hop": "--sizes 8192",
    "long_prompt": "--stages 1 --streams 2 --prompt-tokens 256 --quiet-tokens 4",
    "overload": "--stages 1 --smoke --seconds 1 --capacity-seconds 1 --factor 2",
    "prefix_cache": "--stages 1 --prefix-tokens 64 --tail-tokens 4",
    "recovery": "--with restart --contexts 16 --streams 1 --kill 1",
    "return_path": "--output-tokens 2",
    "router_scaling": "--sampling greedy --streams 2 --window-s 0.5 --contexts 16 --rows 1",
}
VLLM = """
class SamplingParams:
    def __init__(self, **fields): self.max_tokens = fields["max_tokens"]
class LLM:
    def __init__(self, model, **settings): assert settings["dtype"] == "bfloat16"
    def generate(self, prompts, sampling, use_tqdm): return [[1] * sampling.max_tokens for prompt in prompts]
"""
LLAMA_BATCHED_BENCH = "#!/bin/sh\necho '| 128 | 64 | 1 | 192 | 0.5 | 256 | 0.5 | 128 | 1.0 | 192 |'\n"
GGML_RPC_SERVER = """#!{python}
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])))
while True:
    listener.accept()[0].close()
"""


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_LENGTH}))
    return folder


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def vllm_arguments(folder: Path) -> list[str]:
    (folder / "vllm.py").write_text(VLLM)
    python = write_program(folder / "python", f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    return ["--python", str(python)]


def llamacpp_arguments(folder: Path) -> list[str]:
    write_program(folder / "build" / "bin" / "llama-batched-bench", LLAMA_BATCHED_BENCH)
    write_program(folder / "build" / "bin" / "ggml-rpc-server", GGML_RPC_SERVER.format(python=sys.executable))
    (folder / "model.gguf").touch()
    return ["--build", str(folder / "build"), "--gguf", str(folder / "model.gguf")]


STAND_INS = {"against_vllm": vllm_arguments, "against_llamacpp": llamacpp_arguments}


def test_every_benchmark_has_a_size_of_seconds():
    assert sorted(SIZES) == BENCHMARKS


@pytest.mark.parametrize("name", SIZES)
def test_it_runs_to_its_end_and_says_what_it_measured(name, model, smollm2, tmp_path, capfd):
    arguments = ["--rounds", "1", "--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")]
    if name == "router_scaling":  # it reads no weights, and its callers send tokens of a large vocabulary
        arguments += ["--model", str(smollm2)]
    elif name != "hop":
        arguments += ["--model", str(model)]
    if name in STAND_INS:
        arguments += STAND_INS[name](tmp_path)
    importlib.import_module(f"benchmarks.{name}").main([*arguments, *shlex.split(SIZES[name])])
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["benchmark"] == name
    assert written["results"]
    assert (tmp_path / "plot.png").stat().st_size > 0
    shown = capfd.readouterr().out
    assert shown
    if name == "router_scaling":
        assert {"schedule", "detokenize", "serialise", "engine"} <= set(
            written["results"]["parts_us_per_token"]["greedy"]
        )


def test_the_parts_of_the_router_are_places_that_exist():
    for place in profiled_router.PARTS:
        assert (profiled_router.ROUTER_FOLDER / place).exists(), place
