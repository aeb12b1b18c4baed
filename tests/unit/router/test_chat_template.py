"""A chat template renders as with transformers, reaches nothing outside of itself, and its errors are typed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stagecoach.errors import FailedPrecondition, InvalidArgument
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text.chat_template import MAX_TEMPLATE_LENGTH, ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.template_process import RenderLimits, TemplateProcess
from stagecoach_router.text.template_sandbox import chat_environment
from stagecoach_router.text.template_worker import Outcome, answer
from tests.unit.router.anyone import ANYONE

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER = [{"role": "user", "content": "hi"}]

# What real templates use: loop control, namespaces, macros, filters, tests, whitespace rules.
RICH = """
{%- set ns = namespace(system='', count=0) -%}
{%- for message in messages if message.role == 'system' -%}
    {%- set ns.system = ns.system ~ message['content'] | trim ~ ';' -%}
{%- endfor -%}
{{ bos_token }}{% if ns.system %}[{{ ns.system }}]{% endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
{{ loop.index }}/{{ loop.length }} {{ message['role'] | upper }}: {{ message.content | tojson }}{{ '-' * 3 }}
    {%- if loop.last %}{% generation %}<last>{% endgeneration %}{% endif %}
{% endfor %}
{%- macro sign(name) %}<{{ name }}>{% endmacro -%}
{{ sign('n' ~ ns.count) }}{% if tools is none %}no tools{% endif %}
{% if add_generation_prompt %}{{ '<go>' }}{% endif %}{% if sep_token is defined %}never{% endif %}
"""

roles = st.sampled_from(["system", "user", "assistant"])
messages_of = st.builds(lambda role, content: {"role": role, "content": content}, roles, st.text(max_size=12))
conversations = st.lists(messages_of, min_size=1, max_size=6)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process() -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    await process.close()


def reference(source: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<s>": 0}, [])), bos_token="<s>", chat_template=source
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


@given(conversations, st.booleans())
async def test_renders_as_transformers_does(
    process: TemplateProcess, messages: list[dict[str, str]], prompt: bool
) -> None:
    text = await ChatTemplate(RICH, {"bos_token": "<s>"}, process).render(
        messages, ANYONE, add_generation_prompt=prompt
    )
    assert text == reference(RICH, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%5d|%-3s|%.2f|%%' % (3, 'a', 1.5) }}{{ '%(a)s' % {'a': 1} }}{{ '{:>5}|{a[0]}'.format('x', a=[1]) }}",
        "{{ 'a-b'.split('-') | join('+') }}{{ 'a\\nb' | indent(2) }}{{ [1, 2] | tojson(indent=1) }}{{ [1] * 3 }}",
        "{{ ('a', 'b') == ('a', 'b') }}{{ 'a' in ('a', 'b') }}{{ {('a', 1): 2}[('a', 1)] }}{{ {}.fromkeys(['a'], 1) }}",
        "{{ messages | map(attribute='role') | join(',') }}{{ messages }}{{ none }}{{ missing }}{{ 3.14 | round(1) }}",
        "{% set a, b = 1, 2 %}{% for k, v in {'x': 1}.items() %}{{ k ~ v ~ a ~ b }}{% endfor %}{{ dict(x=1) }}",
        "{{ dict.fromkeys([1], 2) }}{{ namespace(self=1).self }}{{ {'a': '<é>'} | tojson }}{{ range(3) | list }}",
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    ],
)
async def test_what_templates_do_every_day_is_as_with_transformers(process: TemplateProcess, source: str) -> None:
    messages = [*USER, {"role": "assistant", "content": "<b> & ü"}]
    text = await ChatTemplate(source, {}, process).render(messages, ANYONE)
    assert text == reference(source, messages, add_generation_prompt=True)


async def test_tells_the_time_by_its_clock() -> None:
    environment = chat_environment(now=lambda: datetime(2025, 3, 4))
    assert environment.from_string("{{ strftime_now('%d %b %Y') }}").render() == "04 Mar 2025"
    assert answer("{{ strftime_now('%Y') }}", {}, 100) == (Outcome.RENDERED, f"{datetime.now():%Y}")


async def test_the_templates_own_refusal_is_the_callers_fault(process: TemplateProcess) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, process)
    with pytest.raises(InvalidArgument, match="roles must alternate") as caught:
        await template.render(USER, ANYONE)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute }}",
        "{{ messages[0]() }}",
        "{% include 'other' %}",
    ],
)
async def test_an_error_inside_the_template_is_typed(process: TemplateProcess, source: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await ChatTemplate(source, {}, process).render(USER, ANYONE)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source", [None, "{% for %}", "{{ x | no_such_filter }}", "x" * (MAX_TEMPLATE_LENGTH + 1), "{{" + "(" * 10_000]
)
async def test_without_a_usable_template_the_setup_is_at_fault(process: TemplateProcess, source: str | None) -> None:
    with pytest.raises(FailedPrecondition, match="chat template"):
        await ChatTemplate(source, {}, process).render(USER, ANYONE)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ lipsum(1) }}",
    ],
)
async def test_a_template_cannot_reach_out(process: TemplateProcess, source: str) -> None:
    with pytest.raises(InvalidArgument):
        await ChatTemplate(source, {}, process).render(USER, ANYONE)


async def test_a_template_may_look_at_every_message_for_each_message(process: TemplateProcess) -> None:
    source = "{% for m in messages %}{% for n in messages[:loop.index] %}{% endfor %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": str(index % 10)} for index in range(1000)]
    assert len(await ChatTemplate(source, {}, process).render(messages, ANYONE)) == 1000


async def test_the_file_comes_before_the_configuration_and_default_before_the_others(process: TemplateProcess) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = json.dumps({"chat_template": several}).encode()
    files = {"tokenizer_config.json": config}
    assert await ChatTemplate.from_files(ModelFiles(files), process).render(USER, ANYONE) == "d"
    both = ModelFiles({**files, "chat_template.jinja": b"file"})
    assert await ChatTemplate.from_files(both, process).render(USER, ANYONE) == "file"
    one = {"tokenizer_config.json": b'{"chat_template": "one"}'}
    assert await ChatTemplate.from_files(ModelFiles(one), process).render(USER, ANYONE) == "one"
    with pytest.raises(FailedPrecondition):
        await ChatTemplate.from_files(ModelFiles({}), process).render(USER, ANYONE)


async def test_all_that_a_caller_wrote_counts_as_text_that_waits() -> None:
    counted: list[int] = []

    class Counting:
        limits = RenderLimits()

        async def render(
            self, source: str, variables: Mapping[str, Any], num_characters: int, caller: Caller
        ) -> tuple[Outcome, str]:
            counted.append(num_characters)
            return Outcome.RENDERED, "text"

    counting: Any = Counting()
    template = ChatTemplate("{{ messages }}", {}, counting)
    await template.render([{"role": "r" * 1000, "content": ""}], ANYONE)
    await template.render([{"role": "", "content": "c" * 1000}], ANYONE)
    await template.render([{"role": "", "content": ""}] * 1000, ANYONE)
    assert len(counted) == 3
    assert all(1000 <= each <= 2002 for each in counted)
