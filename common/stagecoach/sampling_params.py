"""How a caller wants tokens chosen: the parameters, their limits and their defaults. The choosing is the router's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType

from stagecoach.errors import InvalidArgument

MAX_N = 64
MAX_LOGPROBS = 100
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. It is applied in this order: logit bias, penalties, temperature, top-k, top-p, min-p.

    Raises InvalidArgument with the field and the limit for a value that is out of range or not a number.
    """

    temperature: float = 1.0  # 0: the likeliest token, ties to the lowest id
    top_k: int = 0  # only the k likeliest tokens can be drawn; 0: all
    top_p: float = 1.0  # only the smallest set of likeliest tokens whose probability reaches this can be drawn
    min_p: float = 0.0  # only tokens at least so likely, relative to the likeliest, can be drawn
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens in prompt and output
    presence_penalty: float = 0.0  # subtracted once from tokens in the output
    frequency_penalty: float = 0.0  # subtracted for each time the token is in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: chosen at random by the router
    max_tokens: int | None = None  # None: up to the context length
    stop: tuple[str, ...] = ()  # text that ends a completion; it is not part of it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: the chosen token's; k: also those of the k likeliest
    n: int = 1  # how many completions of the one prompt

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _kind("logit_bias", self.logit_bias, Mapping, "a mapping of token ids to numbers")
        check_length("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS, "entries")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 2**31 - 1)
            _number("logit_bias", bias, -1000.0, 1000.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _kind("stop", self.stop, tuple | list, "a tuple of strings")
        check_length("stop", len(self.stop), MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            _kind("stop", text, str, "a tuple of strings")
            if not text:
                raise InvalidArgument("stop: an empty string would stop at once", field="stop")
            check_length("stop", len(text), MAX_STOP_LENGTH, "characters in one string")
        _kind("stop_token_ids", self.stop_token_ids, tuple | list, "a tuple of token ids")
        check_length("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)
        _kind("ignore_eos", self.ignore_eos, bool, "true or false")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("n", self.n, 1, MAX_N)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and no randomness used."""
        return self.temperature == 0.0

    @property
    def shapes_logits(self) -> bool:
        """Whether a penalty or a bias changes logits before they are compared."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or any(self.logit_bias.values())
        )


SAMPLING_FIELDS = tuple(spec.name for spec in fields(SamplingParams))


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    # NaN compares false, and a whole number too large for a float compares exactly.
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good or (open_low and value == low):
        limit = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise InvalidArgument(
            f"{name} must be a number in {limit}; got {value!r}", field=name, limit=limit, value=value
        )


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        limit = f"[{low}, {high}]"
        raise InvalidArgument(
            f"{name} must be a whole number in {limit}; got {value!r}", field=name, limit=limit, value=value
        )


def _kind(name: str, value: object, kind: type | UnionType, what: str) -> None:
    if not isinstance(value, kind):
        text = f"{name} must be {what}; got {type(value).__name__}"
        raise InvalidArgument(text, field=name, limit=what, value=type(value).__name__)


def check_length(name: str, count: int, limit: int, what: str) -> None:
    """Raises InvalidArgument for more of a field's parts than there may be."""
    if count > limit:
        raise InvalidArgument(f"{name} has {count} {what}; at most {limit}", field=name, limit=limit, value=count)
