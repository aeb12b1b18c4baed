"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from stagecoach_client.settings import DEFAULT_TARGET

__all__ = ["DEFAULT_TARGET", "DType", "MaxTokens", "ModelName", "Seed", "Target", "Temperature", "TopK", "TopP"]


class DType(StrEnum):
    """What shards may compute in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


Target = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the router is.")]
ModelName = Annotated[str, typer.Option("--model", help="The model's name; not needed where there is only one.")]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens to generate; default: what the context takes.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token; default: 1.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0: off.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens whose probability reaches p.")]
Seed = Annotated[int | None, typer.Option(help="Makes the choice of tokens repeatable.")]
