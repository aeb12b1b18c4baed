"""What all benchmarks share: their arguments, what they refuse, and how they say what they measured.

A benchmark is a module with `main(argv)`, and ends in `if __name__ == "__main__": report.run(main)`:

    def main(argv: Sequence[str] | None = None) -> None:
        parser = report.argument_parser(__doc__, rounds=5, model=True)
        arguments = report.parse(parser, argv)
        ...
        report.print_table(("payload", "ours", "theirs"), rows)
        report.write(arguments, "hop", settings={...}, results=[...])
        if arguments.plot:
            plots.grouped_bars(arguments.plot, ...)

Every round's figure is kept (`summarize`): a median without its rounds cannot be judged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.machine import machine_facts
from benchmarks.plots import check_matplotlib
from stagecoach.errors import ConfigError, StagecoachError, Unavailable
from stagecoach.rpc.addresses import check_address, split_address
from stagecoach_local.layer_split import read_shape

DEFAULT_MODEL = Path("models/smollm2-135m-instruct")
CONNECT_TIMEOUT_S = 3.0


def argument_parser(description: str | None, *, rounds: int, model: bool = False) -> argparse.ArgumentParser:
    """A parser of what all benchmarks take; `model`: this one needs a checkpoint folder. Add what is special to it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_positive, default=rounds, help=f"how often each side runs (default {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it here; needs matplotlib")
    if model:
        parser.add_argument(
            "--model", type=Path, default=DEFAULT_MODEL, metavar="DIR", help=f"checkpoint (default {DEFAULT_MODEL})"
        )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked before minutes of measuring rather than after. Raises ConfigError and CheckpointError."""
    arguments = parser.parse_args(argv)
    if "model" in arguments and arguments.model is not None:
        check_model(arguments.model)
    if arguments.plot is not None:
        check_matplotlib()
        if arguments.plot.suffix != ".png":
            raise ConfigError(f"plot: {arguments.plot} does not end in .png", field="plot", value=arguments.plot)
    for name in ("json", "plot"):
        path: Path | None = getattr(arguments, name)
        if path is not None:
            _check_writable(name, path)
    return arguments


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark's `main`; what it cannot do it says on stderr, without a traceback, with exit status 1."""
    try:
        main()
    except StagecoachError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def check_model(folder: Path) -> Path:
    """`folder`, if there is a checkpoint in it. Raises CheckpointError with field "model"."""
    read_shape(folder)
    return folder


def check_server(address: str, field: str = "target") -> str:
    """`address`, if somebody listens there. Raises InvalidArgument for what is no address, else Unavailable."""
    check_address(address, field)
    host, port = split_address(address, field)
    try:
        with socket.create_connection((host.strip("[]"), port), CONNECT_TIMEOUT_S):
            return address
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise Unavailable(f"{field}: nobody answers at {address}: {reason}", field=field, value=address) from error


def check_program(path: Path, field: str, what: str) -> Path:
    """`path`, if it is a file; `what` it should be, for the ConfigError that is raised if it is not."""
    if not path.is_file():
        raise ConfigError(f"{field}: {path} is not {what}", field=field, value=path)
    return path


def whole_numbers(text: str, field: str) -> list[int]:
    """The numbers of a list that is separated by commas. Raises ConfigError unless all of them are 1 or more."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        message = f"{field}: whole numbers from 1 on, separated by commas; got {text!r}"
        raise ConfigError(message, field=field, limit=1, value=text)
    return numbers


def summarize(rounds: Sequence[float]) -> dict[str, object]:
    """The median of a figure's rounds, their range, and all of them in order."""
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": list(rounds)}


def write(arguments: argparse.Namespace, benchmark: str, *, settings: Mapping[str, object], results: object) -> None:
    """Writes the JSON file, if one was asked for. `results`: JSON values, or dataclasses of them."""
    if arguments.json is None:
        return
    facts = machine_facts()
    report = {
        "benchmark": benchmark,
        "date": facts.pop("date"),
        "machine": facts,
        "settings": {"rounds": arguments.rounds, **settings},
        "results": results,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2, default=_as_json) + "\n", encoding="utf-8")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Right-aligned columns, the first one left-aligned; a float is shown with three digits that count."""
    cells = [list(columns), *([_format(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]), flush=True)


def _format(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _check_writable(field: str, path: Path) -> None:
    """Makes the folder; a file that was not there is not there afterwards either."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{field}: cannot write {path}: {error.strerror}", field=field, value=path) from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
