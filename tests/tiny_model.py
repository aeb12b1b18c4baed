"""A small random checkpoint with a byte-level tokenizer and a chat template, made on the spot."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant', 'system') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CONTEXT_LENGTH = 512


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token; the special tokens come after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_tiny_model(folder: Path, *, seed: int = 0, num_layers: int = 4) -> LlamaForCausalLM:
    """Writes config, weights (float32) and tokenizer to `folder`; returns the reference model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.2,  # wide, so that the likeliest token is far ahead of the next
        eos_token_id=256,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids of bytes, `length` for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for _ in range(count)]


def greedy(num_tokens: int, **changes: Any) -> dict[str, Any]:
    """What a client is given to generate exactly so many tokens, each the likeliest one."""
    return {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True} | changes


def reference_tokens(model: LlamaForCausalLM, token_ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """The tokens that such a request gets, by transformers."""
    return _reference_tokens(model, tuple(token_ids), num_tokens)


@functools.cache  # many tests ask for the same prompts
@torch.inference_mode()
def _reference_tokens(model: LlamaForCausalLM, token_ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """Token by token, with transformers' own K/V cache."""
    tokens: list[int] = []
    step = model(torch.tensor([token_ids]), use_cache=True)
    while len(tokens) < num_tokens:
        tokens.append(int(step.logits[0, -1].argmax()))
        step = model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return tuple(tokens)
