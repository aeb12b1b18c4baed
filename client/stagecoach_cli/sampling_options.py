"""The options that say how tokens are chosen. Their limits and defaults are those of stagecoach.sampling_params."""

from __future__ import annotations

from typing import Annotated

import typer

MaxTokens = Annotated[
    int | None, typer.Option(help="Generate at most so many tokens. By default, as many as fit the context.")
]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token. The default is 1.")]
TopK = Annotated[int | None, typer.Option(help="Choose only among the k likeliest tokens. 0 sets no limit.")]
TopP = Annotated[
    float | None, typer.Option(help="Choose only among the likeliest tokens that together have probability p.")
]
MinP = Annotated[
    float | None, typer.Option(help="Leave out tokens that are less than p times as likely as the likeliest.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="A number above 1 makes repetitions rarer.")]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtract this from the logits of tokens that are in the output.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtract this for each time that a token is in the output.")
]
Seed = Annotated[int | None, typer.Option(help="Make the choice of tokens repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer at this text. May be given again.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Do not stop where the model would.")]
Logprobs = Annotated[
    int | None, typer.Option(metavar="N", help="With --json, show log-probabilities, also of the N likeliest tokens.")
]
NumCompletions = Annotated[int | None, typer.Option("--n", help="Generate so many completions.")]
