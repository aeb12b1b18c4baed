"""What a benchmark says of itself and of the machine, and what it refuses before it has measured for minutes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import pytest

from benchmarks import machine, plots, report
from stagecoach.errors import CheckpointError, ConfigError, InvalidArgument

CPU_INFO = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu avx2 avx512f amx_tile sse

processor\t: 1
model name\t: Some other CPU
flags\t\t: fpu
"""


@dataclass(frozen=True)
class Figure:
    payload_bytes: int
    rounds: list[float]


def parse(*argv: str, model: bool = False):
    return report.parse(report.argument_parser("what it shows", rounds=4, model=model), argv)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    return tmp_path


def test_the_file_says_what_was_measured_where_and_keeps_every_round(tmp_path):
    arguments = parse("--json", str(tmp_path / "new" / "out.json"), "--rounds", "2")
    report.write(arguments, "hop", settings={"warm_up": 1}, results=[Figure(8, [1.0, 2.0])])
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert list(written) == ["benchmark", "date", "machine", "settings", "results"]
    assert (written["benchmark"], written["settings"]) == ("hop", {"rounds": 2, "warm_up": 1})
    assert written["results"] == [{"payload_bytes": 8, "rounds": [1.0, 2.0]}]
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["versions"]["grpcio"]


def test_a_summary_is_the_median_with_its_range_and_rounds():
    assert report.summarize([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}


def test_what_json_cannot_hold_is_not_written_as_something_else(tmp_path):
    with pytest.raises(TypeError, match="set cannot be written"):
        report.write(parse("--json", str(tmp_path / "a.json")), "hop", settings={}, results={1})


def test_the_cpu_is_the_first_core_with_the_flags_that_matter():
    assert machine.parse_cpu_info(CPU_INFO) == ("Some CPU", ["avx2", "avx512f", "amx_tile"])
    assert machine.parse_cpu_info("Features\t: fp asimd bf16\n") == ("", ["asimd", "bf16"])
    assert machine.parse_cpu_info("") == ("", [])


def test_memory_is_in_bytes():
    assert machine.parse_memory_bytes("MemFree: 5 kB\nMemTotal:       24 kB\n") == 24 * 1024
    assert machine.parse_memory_bytes("") is None


def test_the_default_model_is_looked_for_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="smollm2-135m-instruct is not a checkpoint folder"):
        parse(model=True)


def test_a_folder_with_a_checkpoint_is_taken(checkpoint):
    assert parse("--model", str(checkpoint), model=True).model == checkpoint


def test_a_plot_is_a_png_and_needs_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"does not end in \.png"):
        parse("--plot", str(tmp_path / "a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    parse()
    with pytest.raises(ConfigError, match=r"matplotlib is missing: install Stagecoach with its \[bench\] extra"):
        parse("--plot", str(tmp_path / "a.png"))


def test_files_that_cannot_be_written_are_refused_and_others_not_made(tmp_path):
    parse("--json", str(tmp_path / "a.json"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="json: cannot write"):
        parse("--json", str(tmp_path))


@pytest.mark.parametrize("rounds", ["0", "-1", "x"])
def test_rounds_are_at_least_one(rounds, capsys):
    with pytest.raises(SystemExit):
        parse("--rounds", rounds)
    assert "--rounds" in capsys.readouterr().err


def test_an_address_that_is_none_is_refused():
    with pytest.raises(InvalidArgument, match="target must be HOST:PORT"):
        report.check_server("nowhere")


def test_a_program_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"peer: .* is not a Python interpreter"):
        report.check_program(tmp_path / "python", "peer", "a Python interpreter")


def test_a_typed_error_ends_a_benchmark_without_a_traceback(capsys):
    def main() -> None:
        raise ConfigError("rounds: too many", field="rounds")

    with pytest.raises(SystemExit) as ended:
        report.run(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: rounds: too many\n"


def test_a_table_has_aligned_columns_and_figures_with_three_digits(capsys):
    report.print_table(("payload", "us"), [("8 KB", 12.3456), ("1 MB", 1234.5), ("8 MB", 7)])
    assert capsys.readouterr().out == "payload     us\n8 KB      12.3\n1 MB     1,234\n8 MB         7\n"


@pytest.mark.parametrize("log", [False, True])
def test_plots_are_png_files(tmp_path, log):
    pytest.importorskip("matplotlib")
    bars, lines = tmp_path / "new" / "bars.png", tmp_path / "lines.png"
    plots.grouped_bars(bars, title="t", groups=["a", "b"], series={"x": [1, 2], "y": [3, 4]}, y_label="us", log_y=log)
    points = {"x": [(1.0, 2.0), (10.0, 3.0)]}
    plots.lines(lines, title="t", series=points, x_label="n", y_label="us", log_x=log, log_y=log)
    for path in (bars, lines):
        assert path.read_bytes().startswith(b"\x89PNG")
