"""A jinja2 sandbox in which a template can neither reach out nor, within what is counted, run on for ever.

Jinja's immutable sandbox keeps a template away from the interpreter and from changing what it is given, and bounds one
`range`. On top, every loop round, call and filter takes steps from a budget, and a value that an operator makes may
only be so long. To count, the parsed template is rewritten before it is compiled.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# The longest string or list that one operator may make.
MAX_VALUE_LENGTH = 16 << 20
_MAX_INTEGER_BITS = 4096
# A filter takes one step for this much of a string, and one for each item of a list.
_CHARACTERS_PER_STEP = 256

_steps_left: ContextVar[list[int]] = ContextVar("chat template steps left")


@contextmanager
def step_budget(num_steps: int) -> Iterator[None]:
    """Within it, templates of this sandbox may take `num_steps` together; past that they raise jinja2.TemplateError."""
    token = _steps_left.set([num_steps])
    try:
        yield
    finally:
        _steps_left.reset(token)


class ChatSandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for: transformers' settings, globals and `tojson`."""

    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {name: _charged(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _charged(_to_json), "_step": _step, "_concat": _concat}
        self.globals = {
            "range": self.globals["range"],
            "dict": _make_dict,
            "namespace": _PlainNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: now().strftime(form),
        }

    def compile_counted(self, source: str) -> jinja2.Template:
        """Compiles a template so that its loops and concatenations are counted. Raises jinja2.TemplateError."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(True), "_step", loop)).set_lineno(loop.lineno))
            if loop.test is not None:
                loop.test = _filter(cast(nodes.Expr, loop.test), "_step", loop)
        _replace_concatenations(tree)
        return self.from_string(tree)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call in a template comes here. The names are jinja's: a keyword argument may be called `self`."""
        _take_steps(1)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*` and `**` come here, so that nothing huge is made."""
        if operator == "+":
            length = _length(left) + _length(right)
        elif operator == "*":
            length = max(_length(left) * _size(right), _length(right) * _size(left))
        else:
            length = 0
        if length > MAX_VALUE_LENGTH or (operator != "+" and _bits(operator, left, right) > _MAX_INTEGER_BITS):
            raise jinja2.TemplateError(f"the chat template makes too large a value with {operator}")
        _take_steps(length // _CHARACTERS_PER_STEP)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} marks, for training, what the assistant said. Here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the instance

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True))).set_lineno(line)


class _PlainNamespace(Namespace):
    """Without names that Python gives a meaning."""

    def __init__(__self, *args: Any, **kwargs: Any) -> None:  # noqa: N805 - as in jinja: `self` may be a key
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace of the chat template cannot hold {name!r}")


def _replace_concatenations(node: nodes.Node) -> None:
    """Turns every `a ~ b` under `node` into a filter of ours."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _without_concatenation(value))
        elif isinstance(value, list):
            setattr(node, name, [_without_concatenation(item) for item in value])


def _without_concatenation(item: Any) -> Any:
    if not isinstance(item, nodes.Node):
        return item
    _replace_concatenations(item)
    if isinstance(item, nodes.Concat):
        return _filter(nodes.List(item.nodes), "_concat", item)
    return item


def _filter(value: nodes.Expr, name: str, place: nodes.Node) -> nodes.Filter:
    """`value | name`, as if it were written where `place` is."""
    assert place.environment is not None
    made = nodes.Filter(value, name, [], [], None, None)
    made.set_lineno(place.lineno)
    made.set_environment(place.environment)
    return made


def _take_steps(count: int) -> None:
    left = _steps_left.get()
    left[0] -= count
    if left[0] < 0:
        raise jinja2.TemplateError("the chat template runs too long")


# The context makes jinja call these each time, and not once when it compiles.
@jinja2.pass_context
def _step(context: Context, value: Any) -> Any:
    _take_steps(1)
    return value


@jinja2.pass_context
def _concat(context: Context, values: list[Any]) -> str:
    texts = [str(value) for value in values]
    length = sum(map(len, texts))
    if length > MAX_VALUE_LENGTH:
        raise jinja2.TemplateError("the chat template makes too large a value with ~")
    _take_steps(length // _CHARACTERS_PER_STEP)
    return "".join(texts)


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, taking steps for the size of what it is given."""

    @functools.wraps(function)  # which also keeps jinja's mark of what it wants to be passed
    def charged(*args: Any, **kwargs: Any) -> Any:
        _take_steps(1 + sum(_work(argument) for argument in args))
        return function(*args, **kwargs)

    return charged


def _work(value: Any) -> int:
    return _length(value) // (_CHARACTERS_PER_STEP if isinstance(value, str) else 1)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) and isinstance(value, Sized) else 0


def _size(value: Any) -> int:
    return max(0, int(value)) if isinstance(value, int) else 0


def _bits(operator: str, left: Any, right: Any) -> int:
    """How many bits the product or power of two whole numbers has, at most."""
    if not isinstance(left, int) or not isinstance(right, int):
        return 0
    return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would read; prompts want plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
