"""What a router reads of callers, of its command line, and of a checkpoint's tokenizer files."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stagecoach import errors
from stagecoach.process.settings import parse_size
from stagecoach.rpc.addresses import check_address
from stagecoach.security.api_keys import Grant, new_entry, read_entries, write_entry
from stagecoach.topology import LayerRange
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_router.frontend.convert import read_request
from stagecoach_router.frontend.large_messages import LargeMessages
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.tenants.tenants import Tenants
from stagecoach_router.text import tokenizer as router_tokenizer
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.prompt_encoder import PromptEncoder
from stagecoach_router.text.template_process import RenderLimits, TemplateProcess
from tests.fuzz.engine import Target
from tests.fuzz.service_targets import PROTOBUF_WORDS

CONTEXT_LENGTH = 512
ANYONE = Caller("host", Tenants(None, 0.0).identify(()))
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('role ' + m.role) }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WAIT_S = 10.0


def _tokenizer_json() -> bytes:
    """Every byte is a token; the special tokens come after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    data: bytes = tokenizer.to_str().encode()
    return data


def _files() -> dict[str, bytes]:
    return {
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": json.dumps(
            {
                "eos_token": SPECIAL_TOKENS[0],
                "bos_token": {"content": SPECIAL_TOKENS[1], "special": True},
                "chat_template": [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tools", "template": "t"}],
            }
        ).encode(),
        "special_tokens_map.json": json.dumps({"pad_token": SPECIAL_TOKENS[0]}).encode(),
        "config.json": json.dumps({"vocab_size": 259, "eos_token_id": [256]}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": 256}).encode(),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


def generate(scratch: Path) -> Target:
    """A GenerateRequest, up to the request that the engine is given."""
    tokenizer = router_tokenizer.Tokenizer(ModelFiles(_files()))
    engine: Any = SimpleNamespace(usual_capacity_tokens=lambda num_prompt_tokens: 64 * 16)
    model = model_pb2.ModelDescription(name="m", vocab_size=tokenizer.vocab_size, context_length=CONTEXT_LENGTH)
    encoder = PromptEncoder(tokenizer, ChatTemplate.from_files(ModelFiles(_files()), TemplateProcess()), CONTEXT_LENGTH)
    large, loop = LargeMessages(), asyncio.new_event_loop()
    sampling = pb.SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5, 200: -100.0},
        seed=2**64 - 1,
        max_tokens=20,
        stop=["\n", "stop"],
        stop_token_ids=[7, 8],
        logprobs=3,
        n=2,
    )
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="assistant")])
    corpus = [
        pb.GenerateRequest(prompt="once upon \u00e4 time \U0001f600", sampling=sampling, request_id="r", priority=-3),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 258]), model="m", sampling=sampling),
        pb.GenerateRequest(chat=chat, sampling=pb.SamplingParams(temperature=0.0, max_tokens=1)),
    ]
    words = (*PROTOBUF_WORDS, *(np.float64(value).tobytes() for value in (np.nan, np.inf, -np.inf, 1e308, -1.0)))

    def check(data: bytes) -> None:
        try:
            message = pb.GenerateRequest.FromString(data)
        except DecodeError as error:
            raise errors.InvalidArgument(str(error)) from error
        reading = read_request(message, model=model, encoder=encoder, engine=engine, large=large, caller=ANYONE)
        request = loop.run_until_complete(asyncio.wait_for(reading, WAIT_S))
        assert request.params.max_tokens is not None
        assert 1 <= request.params.max_tokens <= CONTEXT_LENGTH - len(request.prompt_tokens)
        assert all(0 <= token < tokenizer.vocab_size for token in request.prompt_tokens)

    return Target("generate", [message.SerializeToString() for message in corpus], check, words, share=12)


def text(scratch: Path) -> Target:
    """Addresses, layer ranges and sizes, as flags and messages bring them."""
    corpus = ["127.0.0.1:50051", "[::1]:80", "host.example:65535", "0:15", " 3 : 7 ", "512M", "1.5GiB", "1000000"]

    def check(data: bytes) -> None:
        line = data.decode("utf-8", "surrogateescape")
        accepted = 0
        for read in (
            lambda: check_address(line, "address"),
            lambda: check_address(line, "address", listening=True),
            lambda: LayerRange.parse(line),
            lambda: parse_size(line, "size"),
        ):
            try:
                read()
                accepted += 1
            except errors.InvalidArgument as error:
                errors.to_trailing_metadata(error)  # half a character may be quoted in it
        if not accepted:
            raise errors.InvalidArgument("none of them")

    words = (b":", b"[", b"]", b"://", b"0", b"65536", b".", b"GiB", b"\xed\xa0\x80", "\u0661".encode(), b"::")
    return Target("text", [line.encode() for line in corpus], check, words, share=25, max_input_bytes=1 << 12)


def api_keys(scratch: Path) -> Target:
    """The file of hashed keys, and the header that a caller brings, as the first byte says."""
    key, other = f"sc_{'0a' * 8}_{'k' * 43}", f"sc_{'0b' * 8}_{'j' * 43}"
    grant = Grant(requests_per_minute=60, max_concurrent=2, models=("m", "\u00e4"), max_priority=-1, shares_cache=True)
    entries = [new_entry(key, "one", grant), new_entry(other, "two", Grant())]
    callers = Tenants(entries, 0.0)
    file = "".join(map(write_entry, entries)).encode()
    corpus = [b"f" + file, b"hBearer " + key.encode(), b"hbearer " + other.encode()]

    def check(data: bytes) -> None:
        if data[:1] == b"h":
            callers.identify((("authorization", data[1:].decode("latin1")),))
        else:
            Tenants(read_entries(data[1:].decode("utf-8", "replace")), 0.0)

    words = (b"[[keys]]\n", b"name = ", b"sha256 = ", b"models = [", b"'''", b"[" * 5000, b"1e99", b"inf", b"nan")
    return Target("api_keys", corpus, check, words, share=6)


_TEMPLATE_WORDS = (
    "{% for a in range(99999) %}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{", "}}",
    "{% set x = x + x %}", "{% set ns = namespace(x='ab') %}", "{% set ns.x = ns.x ~ ns.x %}", "{% set x = [x, x] %}",
    "{% macro m(n) %}", "{% endmacro %}", "{{ m(9) }}", "x * 10 ** 9", "'a' * 99999999", "2 ** (10 ** 9)",
    "'%999999999d' % 1", "'%*d' % (999999999, 1)", "'{:999999999}'.format(1)", "'{:{}}'.format(1, 999999999)",
    "'x'.ljust(999999999)", "'x'.zfill(999999999)", "'\t'.expandtabs(999999999)", "x.replace('', x)", "x.join(x)",
    "x | center(999999999)", "x | indent(999999999)", "[1] | batch(999999999, 0)", "[1] | slice(999999999)",
    "5 | round(-999999999)", "5 | round(999999999, 'ceil')", "x | tojson(indent=999999999)", "x | wordwrap(1, x)",
    "x | replace('', x)", "x | join(x)", "x | string", "x == x", "x in x", "x | unique | list", "x | urlize",
    "'%s' | format(x)", "x.encode('utf-8')", "x.translate({97: x})", "''.__class__", "cycler", "loop", "caller()",
    "messages", "strftime_now('%' * 99)", "dict(a=x)", "x | groupby('a')", "x | map('upper') | list", "x | xmlattr",
    "{% call m(1) %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{% generation %}", "{% raw %}",
    "x | int(default=99999999)", "x.splitlines()", "x.split('')", "x.partition('a')", "x | list | sort", "x | sum",
)  # fmt: skip


def chat_template(scratch: Path) -> Target:
    """Templates, compiled and rendered in a process of their own, which may be killed; this one may not notice."""
    loop, process = asyncio.new_event_loop(), TemplateProcess(RenderLimits(max_wall_s=1.0))
    corpus = [
        CHAT_TEMPLATE,
        "{% set x = 'ab' %}{% for a in range(60) %}{% set x = x %}{{ x | upper }}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for a in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set x = 'a' * 999 %}{{ x | replace('a', x) | length }}{{ x.join(['b', 'c']) }}{{ '%5d' % 3 }}",
        "{% macro m(n) %}{{ m(n - 1) if n else '' }}{% endmacro %}{{ m(5) }}{{ messages | tojson(indent=2) }}",
        "{% set x = [1, 2] %}{% set y = [x, x] %}{{ y }}{{ y | string }}{{ '{:>5}'.format(x[0]) }}{{ x | sum }}",
    ]

    def check(data: bytes) -> None:
        template = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"}, process)
        messages = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "x" * 200}]
        text = loop.run_until_complete(asyncio.wait_for(template.render(messages, ANYONE), WAIT_S))
        assert len(text) <= 16 << 20

    words = tuple(word.encode() for word in _TEMPLATE_WORDS)
    # The answer may have 16 Mi characters, as bytes and as text.
    return Target(
        "chat_template",
        [source.encode() for source in corpus],
        check,
        words,
        share=1,
        max_input_bytes=1 << 13,
        max_allocated_bytes=256 << 20,
        max_growth_bytes=256 << 20,
    )


def tokenizer_files(scratch: Path) -> Target:
    """One of a checkpoint's small files is hostile: its number comes first, the file after it."""
    files, loop, process = _files(), asyncio.new_event_loop(), TemplateProcess(RenderLimits(max_wall_s=1.0))
    names = sorted(files)
    corpus = [struct.pack("B", index) + files[name] for index, name in enumerate(names)]

    def check(data: bytes) -> None:
        if not data:
            return
        changed = files | {names[data[0] % len(names)]: data[1:]}
        if data[0] % len(names) != names.index("chat_template.jinja"):
            del changed["chat_template.jinja"]
        made = router_tokenizer.Tokenizer(ModelFiles(changed))
        template = ChatTemplate.from_files(ModelFiles(changed), process)
        kinds = router_tokenizer.TextKind
        ids = made.encode_within("hello \u00e4 <|end|>", CONTEXT_LENGTH, kinds.PROMPT).token_ids or []
        detokenizer = made.detokenizer()
        for token_id in ids:
            detokenizer.feed(token_id)
            made.token_text(token_id)
        detokenizer.flush()
        conversation = template.render([{"role": "user", "content": "hi"}], ANYONE)
        text = loop.run_until_complete(asyncio.wait_for(conversation, WAIT_S))
        made.encode_within(text, CONTEXT_LENGTH, kinds.CHAT)

    keys = (
        "decoder type ByteLevel Metaspace Sequence decoders Replace Fuse Strip pattern String content Regex (a+)+$ id"
        " eos_token_id chat_template name default added_tokens special model vocab merges pre_tokenizer normalizer"
        " truncation post_processor TemplateProcessing Split unk_token byte_fallback WordPiece Unigram"
    )
    words = tuple(b'"%s"' % key.encode() for key in keys.split())
    return Target("tokenizer_files", corpus, check, words, share=4, max_input_bytes=1 << 16, max_s=2.0)
