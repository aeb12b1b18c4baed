"""`python -m tests.fuzz --inputs N --seed S [--target NAME]`: N hostile inputs, spread over the targets by their share.

Exit status 1 and a reproducer where one was not taken well. `--only INDEX` runs a single input of one target again.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.engine import Find, Report, fuzz
from tests.fuzz.targets import TARGETS, make_target

# So many inputs between two looks at the clock, and how long they may take before a stack trace ends the run.
CHUNK = 500
HANG_S = 120.0
COLUMNS = ("inputs", "accepted", "inputs/s", "slowest", "most MiB", "grew MiB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=50_000, help="over all targets that run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=sorted(TARGETS), help="this one only")
    parser.add_argument("--only", type=int, metavar="INDEX", help="the one input of --target with this number")
    options = parser.parse_args(arguments)
    if options.inputs < 1:
        parser.error("--inputs must be at least 1")
    if options.only is not None and options.target is None:
        parser.error("--only needs --target")
    logging.disable(logging.CRITICAL)  # a refused message is logged, and nearly all of these are refused
    names = [options.target] if options.target else list(TARGETS)
    with tempfile.TemporaryDirectory() as scratch:
        targets = [make_target(name, Path(scratch)) for name in names]
        shares = sum(target.share for target in targets)
        num_finds = 0
        total = 0
        print(f"{'target':<18}" + "".join(f"{column:>10}" for column in COLUMNS))
        for target in targets:
            count = -(-options.inputs * target.share // shares)
            indices = range(count) if options.only is None else range(options.only, options.only + 1)
            report = Report(target.name)
            try:
                for start in range(0, len(indices), CHUNK):
                    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
                    _add(report, fuzz(target, options.seed, indices[start : start + CHUNK]))
            except Find as find:
                num_finds += 1
                print(find, file=sys.stderr)
            finally:
                faulthandler.cancel_dump_traceback_later()
            total += report.num_inputs
            _print(report)
    print(f"{total} inputs, {num_finds} targets with a find")
    return 1 if num_finds else 0


def _add(total: Report, part: Report) -> None:
    total.num_inputs += part.num_inputs
    total.num_accepted += part.num_accepted
    total.elapsed_s += part.elapsed_s
    total.slowest_s = max(total.slowest_s, part.slowest_s)
    total.allocated_bytes = max(total.allocated_bytes, part.allocated_bytes)
    total.growth_bytes += part.growth_bytes


def _print(report: Report) -> None:
    print(
        f"{report.name:<18}{report.num_inputs:>10}{report.num_accepted:>10}{report.inputs_per_s:>10.0f}"
        f"{1000 * report.slowest_s:>8.1f}ms{report.allocated_bytes / 2**20:>10.1f}{report.growth_bytes / 2**20:>10.1f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
