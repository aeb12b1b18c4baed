"""What one operation of a chat template may make is bounded before it makes it."""

from __future__ import annotations

import time
import tracemalloc

import jinja2
import pytest

from stagecoach.errors import InvalidArgument
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.template_sizes import MAX_VALUE_LENGTH, written_length

MAX_PEAK_BYTES = 8 * MAX_VALUE_LENGTH
BIG = "{% set x = 'a' * 9999999 %}"
# A list that holds itself twice, forty times over: a few hundred bytes that come to terabytes when written.
DEEP = "{% set ns = namespace(x=[1]) %}{% for a in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
DEEP_PAIR = DEEP + DEEP.replace("ns", "other")

HUGE = [
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1.5 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x'.zfill(999999999) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ 'x' | indent(999999999, true) }}",
    "{{ [1] | batch(999999999, 0) | list }}",
    "{{ [1] | slice(999999999) | list }}",
    "{{ 5 | round(-999999999) }}",
    "{{ 5 | round(999999999, 'ceil') }}",
    "{{ [[1]] | tojson(indent=999999999) }}",
    BIG + "{{ x.replace('', x) }}",
    BIG + "{{ x | replace('a', x) }}",
    BIG + "{{ x.join(x) }}",
    BIG + "{{ [x, x, x] | join(x) }}",
    BIG + "{{ range(9999) | map('default', x) | list }}{{ [x, x, x] | string }}",
    BIG + "{{ [none] * 999 | map('default', x, true) | join }}",
    BIG + "{{ x ~ x ~ x }}",
    BIG + "{{ '{0}{0}{0}'.format(x) }}",
    BIG + "{{ '%(a)s%(a)s%(a)s' % {'a': x} }}",
    BIG + "{{ x.translate({97: x}) }}",
    DEEP + "{{ ns.x }}",
    DEEP + "{{ ns.x | string }}",
    DEEP + "{{ ns.x | tojson }}",
    DEEP + "{{ ns.x ~ '' }}",
    DEEP + "{{ '%s' % ns.x }}",
    DEEP + "{{ '{}'.format(ns.x) }}",
    DEEP_PAIR + "{{ ns.x == other.x }}",
    DEEP_PAIR + "{{ ns.x in [other.x] }}",
    DEEP_PAIR + "{{ [ns.x].index(other.x) }}",
    DEEP.replace("[ns.x, ns.x]", "(ns.x, ns.x)") + "{{ {ns.x: 1} | length }}",
    "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
]


@pytest.mark.parametrize("source", HUGE)
def test_an_operation_that_would_make_gigabytes_is_refused(source: str) -> None:
    template = ChatTemplate(source, {})
    tracemalloc.start()
    begin = time.thread_time()
    try:
        with pytest.raises(InvalidArgument) as caught:
            template.render([("user", "hi")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.field == "messages"
    assert peak < MAX_PEAK_BYTES
    assert time.thread_time() - begin < 5.0  # without the bound: minutes, or the machine's memory


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '%5d|%-3s|%.2f|%%' % (3, 'a', 1.5) }}", "    3|a  |1.50|%"),
        ("{{ '%(a)s' % {'a': 1} }}{{ 7 % 4 }}", "13"),
        ("{{ '{:>5}|{a[0]}|{0}'.format('x', a=[1]) }}", None),
        ("{{ '{:>5}|{a[0]}'.format('x', a=[1]) }}", "    x|1"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ 'x'.center(5) }}", "a+b  x  "),
        ("{{ 'a\\nb' | indent(2) }}{{ [1, 2] | tojson(indent=1) }}", "a\n  b[\n 1,\n 2\n]"),
        ("{{ ('a', 'b') == ('a', 'b') }}{{ 'a' in ('a', 'b') }}{{ {('a', 1): 2}[('a', 1)] }}", "TrueTrue2"),
        ("{{ messages | map(attribute='role') | join(',') }}{{ 3.14159 | round(2) }}", "user3.14"),
        ("{{ messages }}{{ none }}{{ missing }}", "[{'role': 'user', 'content': 'hi'}]None"),
        ("{% set a, b = 1, 2 %}{% for k, v in {'x': 1}.items() %}{{ k ~ v ~ a ~ b }}{% endfor %}", "x112"),
    ],
)
def test_what_templates_do_every_day_is_as_it_was(source: str, expected: str | None) -> None:
    template = ChatTemplate(source, {})
    if expected is None:  # numbered and unnumbered fields do not mix in Python, either
        with pytest.raises(InvalidArgument):
            template.render([("user", "hi")])
    else:
        assert template.render([("user", "hi")]) == expected


def test_time_is_bounded_where_steps_do_not_measure_it() -> None:
    source = BIG + "{% for a in range(99999) %}{% for b in range(99) %}{% set y = x[1:] %}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, {}, max_render_s=0.2)
    begin = time.thread_time()
    with pytest.raises(InvalidArgument, match="too long"):
        template.render([("user", "hi")])
    assert time.thread_time() - begin < 5.0


def test_a_part_that_is_shared_counts_each_time_and_is_looked_at_once() -> None:
    value: object = "abc"
    for _ in range(100):
        value = [value, value]
    assert written_length(value) > 2**100
    loop: list[object] = []
    loop.append(loop)
    assert written_length(loop) > MAX_VALUE_LENGTH
    for _ in range(10_000):
        value = [value]
    with pytest.raises(jinja2.TemplateError, match="too deep"):
        written_length(value)


def test_every_message_may_be_gathered_into_a_list() -> None:
    gather = "{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}"
    source = "{% set ns = namespace(l=[]) %}" + gather + "{{ ns.l | length }}"
    assert ChatTemplate(source, {}).render([("user", "x")] * 1000) == "1000"


def test_a_deep_expression_compiles_in_no_time() -> None:
    begin = time.thread_time()
    template = ChatTemplate("{{ messages" + ".s" * 190 + " is defined }}", {})
    with pytest.raises(InvalidArgument, match="no attribute"):
        template.render([("user", "hi")])
    assert time.thread_time() - begin < 1.0  # with jinja's optimizer: two seconds and more
