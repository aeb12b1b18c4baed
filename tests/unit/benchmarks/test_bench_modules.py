"""Every benchmark explains itself, and refuses a model that is not there in one line, before it starts anything."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from benchmarks import report

FOLDER = Path(__file__).parents[3] / "benchmarks"


def has_main(path: Path) -> bool:
    """Whether the module is a benchmark: one that `report.run` runs."""
    return path.stem != "report" and "report.run(main)" in path.read_text()


BENCHMARKS = sorted(path.stem for path in FOLDER.glob("*.py") if has_main(path))


def test_benchmarks_are_found():
    assert {"hop", "against_transformers", "against_vllm", "against_llamacpp"} <= set(BENCHMARKS)


@pytest.fixture(params=BENCHMARKS)
def benchmark(request):
    return importlib.import_module(f"benchmarks.{request.param}")


def takes_a_model(benchmark, capsys) -> bool:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--help"])
    assert ended.value.code == 0
    return "--model" in capsys.readouterr().out


def test_help_says_what_it_shows_and_the_arguments_all_share(benchmark, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert benchmark.__doc__.splitlines()[0] in said
    for argument in ("--rounds", "--json", "--plot"):
        assert argument in said


def test_a_model_that_is_not_there_is_one_line(benchmark, tmp_path, capsys):
    if not takes_a_model(benchmark, capsys):
        pytest.skip("needs no model")
    with pytest.raises(SystemExit) as ended:
        report.run(lambda: benchmark.main(["--model", str(tmp_path / "nowhere")]))
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "nowhere is not a checkpoint folder" in line


def test_the_makefile_and_the_readme_know_every_benchmark():
    makefile = (FOLDER.parent / "Makefile").read_text()
    readme = (FOLDER / "README.md").read_text()
    for name in BENCHMARKS:
        assert name in makefile
        assert f"`{name}`" in readme


def test_peers_scripts_import_nothing_of_ours():
    """They run in environments where it is not installed."""
    for path in sorted((FOLDER / "peers").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("stagecoach", "benchmarks"))], path.name
