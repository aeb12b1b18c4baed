"""What a cluster did, for people to read. `stagecoach status` and `stagecoach bench` both show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagecoach_cli.terminal import format_fraction

if TYPE_CHECKING:
    from rich.table import Table

    from stagecoach_client.activity import Activity, StageActivity

# All times are per step, so that they can be compared with each other.
_COLUMNS = ("stage", "layers", "steps", "tokens", "busy", "bubble", "compute ms", "wait ms", "queue ms", "decode ms",
            "encode ms", "fast frames")  # fmt: skip


def activity_line(done: Activity) -> str:
    """What the router counted, in one line."""
    parts = [
        f"sequences ran for {done.active_s:.1f} s",
        f"prefix hits {format_fraction(done.prefix_hit_fraction)}",
        f"{done.num_preemptions} preemptions",
        f"{done.num_repeats} repeats",
    ]
    if done.result_bytes_per_token is not None and done.result_payload_bytes_per_token is not None:
        parts.append(
            f"{done.result_bytes_per_token:.0f} B came back per token "
            f"({done.result_payload_bytes_per_token:.0f} of logits and ids)"
        )
    return ", ".join(parts)


def stage_table(title: str, done: Activity) -> Table:
    """A table with a row for each stage. If there are several pipelines, it says which one each stage is in."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    several = any(stage.pipeline for stage in done.stages)
    for name in ("pipeline", *_COLUMNS) if several else _COLUMNS:
        table.add_column(name, justify="right")
    for stage in done.stages:
        cells = (str(stage.pipeline), *_cells(stage)) if several else _cells(stage)
        table.add_row(*map(Text, cells))
    return table


def _cells(stage: StageActivity) -> tuple[str, ...]:
    times_s = (stage.compute_s, stage.wait_s, stage.queue_s, stage.decode_s, stage.encode_s)
    return (
        str(stage.stage),
        stage.layers,
        str(stage.num_steps),
        str(stage.num_tokens),
        format_fraction(stage.busy_fraction),
        format_fraction(stage.bubble_fraction),
        *(f"{1000 * time_s / stage.num_steps:.2f}" if stage.num_steps else "-" for time_s in times_s),
        f"{stage.num_fast_frames} of {stage.num_frames}",
    )
