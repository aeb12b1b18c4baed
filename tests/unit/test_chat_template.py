from __future__ import annotations

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stagecoach.errors import FailedPrecondition, InvalidArgument
from stagecoach_router.text.chat_template import MAX_TEMPLATE_LENGTH, ChatTemplate
from stagecoach_router.text.model_files import ModelFiles

USER = [("user", "hi")]

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
conversations = st.lists(st.tuples(roles, st.text(max_size=12)), min_size=1, max_size=6)


def reference(source: str, messages: list[tuple[str, str]], *, add_generation_prompt: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<s>": 0}, [])), bos_token="<s>", chat_template=source
    )
    dicts = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


@given(conversations, st.booleans())
def test_renders_as_transformers_does(messages: list[tuple[str, str]], prompt: bool) -> None:
    text = ChatTemplate(RICH, {"bos_token": "<s>"}).render(messages, add_generation_prompt=prompt)
    assert text == reference(RICH, messages, add_generation_prompt=prompt)


def test_takes_pairs_and_mappings_alike() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}={{ m.content }}{% endfor %}", {})
    assert template.render([("user", "hi")]) == template.render([{"role": "user", "content": "hi"}]) == "user=hi"


def test_tells_the_time_by_the_given_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2025, 3, 4))
    assert template.render(USER) == "04 Mar 2025"


def test_the_templates_own_refusal_is_the_callers_fault() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidArgument, match="roles must alternate") as caught:
        template.render(USER)
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
def test_an_error_inside_the_template_is_typed(source: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ChatTemplate(source, {}).render(USER)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source", [None, "{% for %}", "{{ x | no_such_filter }}", "x" * (MAX_TEMPLATE_LENGTH + 1), "{{" + "(" * 10_000]
)
def test_without_a_usable_template_the_setup_is_at_fault(source: str | None) -> None:
    with pytest.raises(FailedPrecondition, match="chat template"):
        ChatTemplate(source, {}).render(USER)


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
def test_a_template_cannot_reach_out(source: str) -> None:
    with pytest.raises(InvalidArgument):
        ChatTemplate(source, {}).render(USER)


ROUNDS = "{% for a in range(9999) %}"


@pytest.mark.parametrize(
    "source",
    [
        f"{ROUNDS * 3}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
        f"{ROUNDS * 2}{{% for a in range(9999) if false %}}x{{% endfor %}}{{% endfor %}}{{% endfor %}}",
        "{% macro m(n) %}{{ m(n - 1) if n else '' }}{{ m(n - 1) if n else '' }}{% endmacro %}{{ m(40) }}",
        "{% for a in [1] recursive %}{{ loop(range(9999)) }}{% endfor %}",
        "{% set r = range(99999) %}" + ROUNDS + "{% set x = r | list | length %}{% endfor %}",
        "{{ range(10 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{{ 2 ** (10 ** 9) }}",
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    template = ChatTemplate(source, {}, max_steps=100_000)
    with pytest.raises(InvalidArgument) as caught:
        template.render(USER)
    assert caught.value.field == "messages"


def test_output_is_bounded() -> None:
    template = ChatTemplate("{% for a in range(100) %}0123456789{% endfor %}", {}, max_output_length=500)
    with pytest.raises(InvalidArgument) as caught:
        template.render(USER)
    assert caught.value.limit == "500"


def test_steps_of_one_rendering_do_not_count_for_the_next() -> None:
    template = ChatTemplate("{% for a in range(60) %}.{% endfor %}", {}, max_steps=100)
    assert [template.render(USER) for _ in range(3)] == ["." * 60] * 3


def test_a_template_may_look_at_every_message_for_each_message() -> None:
    source = "{% for m in messages %}{% for n in messages[:loop.index] %}{% endfor %}{{ m.content }}{% endfor %}"
    messages = [("user", str(index % 10)) for index in range(1000)]
    assert len(ChatTemplate(source, {}).render(messages)) == 1000


def test_the_file_comes_before_the_configuration_and_default_before_the_others() -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = json.dumps({"chat_template": several}).encode()
    files = {"tokenizer_config.json": config}
    assert ChatTemplate.from_files(ModelFiles(files), {}).render(USER) == "d"
    assert ChatTemplate.from_files(ModelFiles({**files, "chat_template.jinja": b"file"}), {}).render(USER) == "file"
    one = {"tokenizer_config.json": b'{"chat_template": "one"}'}
    assert ChatTemplate.from_files(ModelFiles(one), {}).render(USER) == "one"
    with pytest.raises(FailedPrecondition):
        ChatTemplate.from_files(ModelFiles({}), {}).render(USER)
