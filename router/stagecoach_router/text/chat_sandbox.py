"""A jinja2 sandbox in which a template can neither reach out nor, within what is counted, run on for ever.

Jinja's immutable sandbox keeps a template away from the interpreter and from changing what it is given, and bounds one
`range`. On top, every loop round, call and filter takes steps from a budget, which also ends with the time that the
rendering thread may take; and what an operator, method or filter would make is bounded before it is made (see
template_sizes.py). To count, the parsed template is rewritten before it is compiled.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from stagecoach_router.text.template_sizes import (
    bounded_list,
    check_filter,
    check_format_spec,
    check_length,
    check_method,
    check_printf,
    written_length,
)

_MAX_INTEGER_BITS = 4096
# A filter takes one step for this much of a string, and one for each item of a list.
_CHARACTERS_PER_STEP = 256
# The clock is looked at once in so many times that steps are taken.
_TAKINGS_PER_LOOK = 64


@dataclass(slots=True)
class _Budget:
    num_steps: int
    end_s: float
    num_takings: int = 0


_budget: ContextVar[_Budget] = ContextVar("what is left of a chat template's steps and time")

# Filters that make one value of all that a generator gives.
_DRAINING = frozenset(("join", "string", "sort", "unique", "sum", "groupby", "tojson", "max", "min", "dictsort"))


@contextmanager
def step_budget(num_steps: int, max_s: float) -> Iterator[None]:
    """Within it, templates of this sandbox may take `num_steps` together, and `max_s` seconds of their thread's time.

    Past that they raise jinja2.TemplateError.
    """
    token = _budget.set(_Budget(num_steps, time.thread_time() + max_s))
    try:
        yield
    finally:
        _budget.reset(token)


class ChatSandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for: transformers' settings, globals and `tojson`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # what folds constants takes time with the cube of how deep an expression is
            finalize=_writable,
        )
        self.filters = {name: _charged(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _charged("tojson", _to_json)}
        self.filters |= {"_step": _step, "_concat": _concat, "_writable": _comparable}
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
        for compared in list(tree.find_all(nodes.Compare)):
            compared.expr = _filter(compared.expr, "_writable", compared)
            for operand in compared.ops:
                operand.expr = _filter(operand.expr, "_writable", compared)
        for literal in list(tree.find_all(nodes.Tuple)):
            if literal.ctx == "load":  # a tuple is hashed part by part
                literal.items = [_filter(item, "_writable", literal) for item in literal.items]
        _replace_concatenations(tree)
        return self.from_string(tree)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call in a template comes here. The names are jinja's: a keyword argument may be called `self`."""
        _take_steps(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = tuple(bounded_list(arg, "join") if isinstance(arg, Iterator) else arg for arg in args)
            _take_steps(len(owner) // _CHARACTERS_PER_STEP)
            check_method(owner, __obj.__name__, args, kwargs)
        elif isinstance(owner, list | tuple | dict):  # `index` and the like compare
            check_length(written_length(owner) + written_length(args), "a call")
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `str.format_map`, with every field bounded."""
        if super().wrap_str_format(value) is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                args, kwargs = (), dict(*args)
            text: str = _BoundedFormatter(self).vformat(value.__self__, args, kwargs)
            return text

        return functools.update_wrapper(bounded, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%` come here, so that nothing huge is made."""
        if operator == "+":
            length = _length(left) + _length(right)
        elif operator == "*":
            length = max(_length(left) * _size(right), _length(right) * _size(left))
        else:
            length = 0
        check_length(length, operator)
        if operator in ("*", "**") and _bits(operator, left, right) > _MAX_INTEGER_BITS:
            raise jinja2.TemplateError(f"the chat template makes too large a value with {operator}")
        if operator == "%" and isinstance(left, str):
            check_printf(left, right)
        _take_steps(length // _CHARACTERS_PER_STEP)
        return super().call_binop(context, operator, left, right)


class _BoundedFormatter(SandboxedFormatter):
    """Jinja's, which keeps fields away from the interpreter; here their widths and the result are bounded, too."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._length = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        check_format_spec(format_spec)
        check_length(self._length + written_length(value), "format")
        text: str = super().format_field(value, format_spec)
        self._length += len(text)
        return text


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
    budget = _budget.get()
    budget.num_steps -= count
    budget.num_takings += 1
    if budget.num_steps < 0 or (budget.num_takings % _TAKINGS_PER_LOOK == 0 and time.thread_time() > budget.end_s):
        raise jinja2.TemplateError("the chat template runs too long")


def _writable(value: Any) -> Any:
    """What is about to be written into the output."""
    if not isinstance(value, str):
        check_length(written_length(value), "{{ }}")
    return value


# The context makes jinja call these each time, and not once when it compiles.
@jinja2.pass_context
def _comparable(context: Context, value: Any) -> Any:
    """What is about to be compared or hashed: all of it at the worst."""
    if isinstance(value, list | tuple | dict):
        check_length(written_length(value), "a comparison")
    elif isinstance(value, str):
        _take_steps(len(value) // _CHARACTERS_PER_STEP)
    return value


@jinja2.pass_context
def _step(context: Context, value: Any) -> Any:
    _take_steps(1)
    return value


@jinja2.pass_context
def _concat(context: Context, values: list[Any]) -> str:
    length = sum(written_length(value) for value in values)
    check_length(length, "~")
    texts = [str(value) for value in values]
    _take_steps(length // _CHARACTERS_PER_STEP)
    return "".join(texts)


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, taking steps for the size of what it is given, and bounded in what it makes of it."""
    place = int(hasattr(function, "jinja_pass_arg"))  # of the value: jinja may put something of its own before it

    @functools.wraps(function)  # which also keeps jinja's mark of what it wants to be passed
    def charged(*args: Any, **kwargs: Any) -> Any:
        _take_steps(1 + sum(_work(argument) for argument in args))
        if name in _DRAINING and len(args) > place and isinstance(args[place], Iterator):
            args = (*args[:place], bounded_list(args[place], name), *args[place + 1 :])
        if len(args) > place:
            check_filter(name, args[place], args[place + 1 :], kwargs)
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
