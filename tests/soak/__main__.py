"""`python -m tests.soak --minutes N --seed S`: mixed load and random faults, and nothing may be lost, wrong or left.

A cluster of real processes is asked a fixed set of requests while nothing disturbs it. Then callers of many kinds ask
for them again, for N minutes, while shards and the router are killed, stopped and cut off. Each answer has to be the
undisturbed one. In the second half the router and the first shard are stopped and cut off, but not killed, and their
memory and descriptors at its end are compared with those at its beginning. It ends with exit status 1 and the reason
where something was lost, wrong or left over, or grew, or a process printed a traceback or ended without being killed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stagecoach.errors import StagecoachError
from tests.soak.failure import Failed
from tests.soak.run import Plan, soak
from tests.tiny_model import write_tiny_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--callers", type=int, default=24)
    parser.add_argument("--replicas", type=int, default=1, help="pipelines of two shards each")
    parser.add_argument("--spares", type=int, default=0, help="shards without layers of their own")
    options = parser.parse_args(argv)
    for name, least in {"minutes": 0.1, "callers": 1, "replicas": 1, "spares": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    plan = Plan(60 * options.minutes, options.seed, options.callers, options.replicas, options.spares)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        try:
            asyncio.run(soak(plan, Path(folder), lambda line: print(line, flush=True)))
        except (Failed, StagecoachError, TimeoutError) as error:
            print(f"error: seed {options.seed}: {error}", file=sys.stderr)
            return 1
    print(f"seed {options.seed}: nothing lost, wrong or left over after {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
