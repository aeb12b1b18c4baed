"""How much one operation of a chat template would make, told before it makes it. Pure.

One operator, method or filter can ask for gigabytes in a few characters: a width in a format, a `replace` of nothing by
something, a list that holds itself twice, sixty times over. Each is bounded here by what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2.utils import Namespace

# The longest string or list that one operation may make, and the most that may be written of a value.
MAX_VALUE_LENGTH = 16 << 20
# The largest width, precision, indentation or number of parts.
MAX_WIDTH = 10_000

_PRINTF = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?")
_DIGITS = re.compile("[0-9]+")
# Filters by name that only pass their value on, take it apart or count it: what it would be when written is no matter.
_STRUCTURAL = frozenset(
    ("length", "count", "first", "last", "list", "items", "default", "d", "attr", "batch", "slice", "reverse", "map")
) | {"select", "reject", "selectattr", "rejectattr", "random", "safe"}
# Filters whose whole numbers are widths, counts and precisions.
_SIZED = frozenset(
    ("batch", "center", "format", "indent", "round", "slice", "tojson", "truncate", "wordwrap", "pprint")
)


def check_length(length: int, what: str) -> None:
    """Raises jinja2.TemplateError for a value that is too long."""
    if length > MAX_VALUE_LENGTH:
        raise jinja2.TemplateError(f"the chat template makes too large a value with {what}")


def check_width(value: object, what: str) -> None:
    """Raises jinja2.TemplateError for a whole number that is too large for a width."""
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise jinja2.TemplateError(f"the chat template asks {what} for {value if abs(value) < 10**20 else 'too many'}")


def written_length(value: object) -> int:
    """How many characters and items `value` comes to when it is written out, compared or hashed, roughly.

    A part that several others hold counts each time, and is looked at once; one that holds itself is too long. Raises
    jinja2.TemplateError where parts lie too deep within each other.
    """
    try:
        return _written(value, {})
    except RecursionError:
        raise jinja2.TemplateError("the chat template puts values too deep into each other") from None


def _written(value: object, known: dict[int, int]) -> int:
    if isinstance(value, str | bytes):
        return len(value) + 2
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    parts: Iterable[object]
    if isinstance(value, Mapping):
        parts = (part for item in value.items() for part in item)
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    elif isinstance(value, range):
        return 8 * len(value)
    elif isinstance(value, Namespace):
        parts = (object.__getattribute__(value, "_Namespace__attrs"),)  # it hides everything but what was set
    else:
        return 64
    key = id(value)
    if key not in known:
        known[key] = MAX_VALUE_LENGTH + 1  # of one that holds itself
        known[key] = 2 + sum(_written(part, known) + 2 for part in parts)
    return known[key]


def check_printf(template: str, values: object) -> None:
    """For `template % values`: every width is bounded, none comes out of the values, and the result is not too long."""
    longest = written_length(values) if isinstance(values, tuple | list | dict) else written_length((values,))
    num_fields = 0
    for width, precision in _PRINTF.findall(template):
        num_fields += 1
        for number in (width, precision):
            if number == "*" or (number and len(number) > 5):
                raise jinja2.TemplateError("the chat template makes too large a value with %")
            check_width(int(number or 0), "%")
    check_length(len(template) + num_fields * max(longest, 2 * MAX_WIDTH), "%")


def check_format_spec(spec: str) -> None:
    """For one field of `str.format`, its spec already filled in."""
    for number in _DIGITS.findall(spec):
        if len(number) > 5:
            raise jinja2.TemplateError("the chat template makes too large a value with format")
        check_width(int(number), "format")


def check_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """For a method of a string: the length of what it would return."""
    for value in (*args, *kwargs.values()):
        check_width(value, name)
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        check_length(replaced_length(text, args[0], args[1]), name)
    elif name == "join" and args:
        check_length(_joined_length(text, args[0]), name)
    elif name == "expandtabs":
        width = next((value for value in (*args, *kwargs.values()) if isinstance(value, int)), 8)
        check_length(len(text) + text.count("\t") * max(0, width), name)
    elif name == "translate":
        check_length(len(text) * max(1, *(written_length(arg) for arg in args), 1), name)


def check_filter(name: str, value: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """For `value | name(args)`."""
    extra = (*args, *kwargs.values())
    if name in _SIZED:
        for number in extra:
            check_width(number, name)
    if name in _STRUCTURAL:
        return
    length = written_length(value)
    if name == "replace" and len(args) >= 2:
        length = replaced_length(str(value) if length < MAX_VALUE_LENGTH else "", str(args[0]), str(args[1]))
    elif name == "join":
        length = _joined_length(str(extra[0]) if extra else "", value)
    elif name in ("indent", "wordwrap", "xmlattr", "urlize", "tojson", "pprint"):
        # Something is put before or after each line, word or item.
        added = max([abs(each) if isinstance(each, int) else written_length(each) for each in extra], default=8)
        length += _num_lines(value, name) * added
    elif name == "format":
        check_printf(str(value), args or dict(kwargs))
    check_length(length, name)
    for each in extra:
        check_length(written_length(each), name)


def replaced_length(text: str, old: str, new: str) -> int:
    """The length of `text.replace(old, new)`."""
    return len(text) + text.count(old) * max(0, len(new) - len(old))


def _joined_length(separator: str, items: object) -> int:
    if isinstance(items, str):
        return len(items) * (1 + len(separator))
    if isinstance(items, Mapping | list | tuple | set | frozenset | range):
        return written_length(items) + len(items) * len(separator)
    return written_length(items)


def _num_lines(value: object, name: str) -> int:
    if name in ("tojson", "pprint"):
        return written_length(value) // 2
    if not isinstance(value, str):
        return 1
    return value.count("\n") + 1 if name == "indent" else len(value)


def bounded_list(items: Iterator[Any], what: str) -> list[Any]:
    """What a generator gives, as long as it is not too much when written out."""
    taken, length = [], 0
    for item in items:
        taken.append(item)
        length += written_length(item)
        check_length(length, what)
    return taken
