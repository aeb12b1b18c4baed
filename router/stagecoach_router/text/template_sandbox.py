"""The jinja environment that chat templates are written for: transformers' settings in jinja's own sandbox.

The sandbox keeps a template away from the interpreter and from changing what it is given. It bounds neither time nor
memory: the process that renders does (template_worker.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def chat_environment(now: Callable[[], datetime] = datetime.now) -> jinja2.Environment:
    """The environment. `now` is the clock behind `strftime_now`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # folding constants takes time with the cube of how deep an expression is
    )
    environment.filters["tojson"] = _to_json
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's, which refuses long ones
        "dict": _PlainDict(),
        "namespace": _PlainNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: now().strftime(form),
    }
    return environment


class _Generation(Extension):
    """{% generation %} marks, for training, what the assistant said. Here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the instance

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True))).set_lineno(line)


class _PlainDict:
    """What `dict` is to a template: a way to make one, and not the class."""

    def __call__(__self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: N805 - `self` may be a key
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore: to Python, some of those have a meaning."""

    def __init__(__self, *args: Any, **kwargs: Any) -> None:  # noqa: N805 - `self` may be a key
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, for prompts. Jinja's own filter escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
