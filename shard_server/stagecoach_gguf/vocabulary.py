"""The tokenizer in a GGUF file's metadata, as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors

from stagecoach.errors import CheckpointError
from stagecoach_gguf.byte_level import byte_level_recipe
from stagecoach_gguf.gguf_file import GGUFFile
from stagecoach_gguf.sentence_piece import merges_of, sentence_piece_tokenizer


class TokenType(IntEnum):
    """What a token is for: the numbers of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of tokens that mean something; None where the file names none. Those in `stops` end a completion."""

    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    stops: tuple[int, ...]

    def config(self) -> dict[str, int]:
        """The entries of config.json that name them."""
        entries = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.padding}
        return {name: token_id for name, token_id in entries.items() if token_id is not None}

    def generation_config(self) -> dict[str, object]:
        """The contents of generation_config.json."""
        config: dict[str, object] = {**self.config()}
        if self.stops:
            config["eos_token_id"] = self.stops[0] if len(self.stops) == 1 else list(self.stops)
        return config


class Vocabulary:
    """Reads tokenizer.ggml.*. Raises CheckpointError where the tokenizer cannot be rebuilt exactly."""

    def __init__(self, file: GGUFFile, vocab_size: int) -> None:
        self._file = file
        self._kind = file.text("tokenizer.ggml.model")
        if self._kind not in ("gpt2", "llama"):
            raise CheckpointError(
                f"tokenizer.ggml.model {self._kind!r} cannot be imported",
                field="tokenizer.ggml.model",
                limit="gpt2, llama",
                value=self._kind,
            )
        # An unknown one is refused before any work is done.
        self._recipe = byte_level_recipe(file.text("tokenizer.ggml.pre", "default")) if self._kind == "gpt2" else None
        self._tokens = file.texts("tokenizer.ggml.tokens")
        self._types = self._read_types()
        if len(self._tokens) > vocab_size:
            raise CheckpointError(
                f"the file names {len(self._tokens)} tokens and embeds {vocab_size}",
                field="tokenizer.ggml.tokens",
                limit=vocab_size,
                value=len(self._tokens),
            )
        self.special = SpecialTokens(
            bos=self._token_id("bos"),
            eos=self._token_id("eos"),
            unknown=self._token_id("unknown"),
            padding=self._token_id("padding"),
            stops=self._stops(),
        )

    def write(self, folder: Path, context_length: int) -> dict[str, object]:
        """Writes tokenizer.json into `folder`; returns tokenizer_config.json."""
        tokenizer = self._build()
        tokenizer.add_tokens(self._added_tokens())
        tokenizer.post_processor = self._post_processor()
        # Not with the library's `save`, whose errors do not tell a full disk from a bug.
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        return self._tokenizer_config(context_length)

    def _build(self) -> Tokenizer:
        vocab = {token: token_id for token_id, token in enumerate(self._tokens)}
        if len(vocab) != len(self._tokens):
            raise CheckpointError("tokenizer.ggml.tokens holds a token twice", field="tokenizer.ggml.tokens")
        try:
            if self._recipe is not None:
                merges = [self._merge(text) for text in self._file.texts("tokenizer.ggml.merges")]
                return self._recipe.tokenizer(vocab, merges)
            adds_space = self._file.flag("tokenizer.ggml.add_space_prefix", True)
            unknown = None if self.special.unknown is None else self._tokens[self.special.unknown]
            return sentence_piece_tokenizer(vocab, merges_of(self._scored()), unknown, adds_space=adds_space)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises the bare class: a merge names a token that is not there
            raise CheckpointError(
                f"the tokenizer's merges do not fit its tokens: {error}", field="tokenizer.ggml.merges"
            ) from error

    def _scored(self) -> list[tuple[str, float]]:
        """The tokens that text may become, with their scores."""
        scores = self._file.numbers("tokenizer.ggml.scores")
        self._check_count("tokenizer.ggml.scores", len(scores))
        entries = zip(self._tokens, scores, self._types, strict=True)
        return [(token, score) for token, score, kind in entries if kind is TokenType.NORMAL]

    def _post_processor(self) -> processors.TemplateProcessing:
        """Puts the bos and eos tokens around a plain prompt, where the file asks for them."""
        usual = self._recipe is None or self._recipe.adds_bos
        adds_bos = self._file.flag("tokenizer.ggml.add_bos_token", usual)
        adds_eos = self._file.flag("tokenizer.ggml.add_eos_token", False)
        before = [self._required("bos", self.special.bos)] if adds_bos else []
        after = [self._required("eos", self.special.eos)] if adds_eos else []
        names = {token_id: self._tokens[token_id] for token_id in (*before, *after)}
        return processors.TemplateProcessing(
            single=[*(names[token_id] for token_id in before), "$A", *(names[token_id] for token_id in after)],
            special_tokens=[(name, token_id) for token_id, name in names.items()],
        )

    def _added_tokens(self) -> list[AddedToken]:
        """Tokens that are found in text before it is cut into words. Decoding leaves out all but the user's."""
        return [
            AddedToken(token, special=kind is not TokenType.USER_DEFINED, normalized=False)
            for token, kind in zip(self._tokens, self._types, strict=True)
            if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
        ]

    def _tokenizer_config(self, context_length: int) -> dict[str, object]:
        config: dict[str, object] = {
            # The class that takes tokenizer.json as it is; a model's own class may rebuild parts of it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
        }
        special = {
            "bos_token": self.special.bos,
            "eos_token": self.special.eos,
            "unk_token": self.special.unknown,
            "pad_token": self.special.padding,
        }
        config |= {name: self._tokens[token_id] for name, token_id in special.items() if token_id is not None}
        default = self._file.text("tokenizer.chat_template", "")
        prefix = "tokenizer.chat_template."
        named = {key.removeprefix(prefix): self._file.text(key) for key in self._file.keys_under(prefix)}
        if named:
            templates = {**({"default": default} if default else {}), **named}
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        elif default:
            config["chat_template"] = default
        return config

    def _read_types(self) -> list[TokenType]:
        if "tokenizer.ggml.token_type" not in self._file:
            return [TokenType.NORMAL] * len(self._tokens)
        numbers = self._file.integers("tokenizer.ggml.token_type")
        try:
            types = [TokenType(number) for number in numbers]
        except ValueError as error:
            raise CheckpointError(f"tokenizer.ggml.token_type: {error}", field="tokenizer.ggml.token_type") from None
        self._check_count("tokenizer.ggml.token_type", len(types))
        return types

    def _check_count(self, key: str, count: int) -> None:
        if count != len(self._tokens):
            raise CheckpointError(
                f"{key} has {count} entries for {len(self._tokens)} tokens",
                field=key,
                limit=len(self._tokens),
                value=count,
            )

    def _stops(self) -> tuple[int, ...]:
        ids = (self._token_id(name) for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    def _token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._file:
            return None
        token_id = self._file.integer(key)
        if not 0 <= token_id < len(self._tokens):
            raise CheckpointError(f"{key} is {token_id}", field=key, limit=len(self._tokens) - 1, value=token_id)
        return token_id

    @staticmethod
    def _required(name: str, token_id: int | None) -> int:
        if token_id is None:
            key = f"tokenizer.ggml.{name}_token_id"
            raise CheckpointError(f"the tokenizer adds a {name} token and names none", field=key)
        return token_id

    @staticmethod
    def _merge(text: str) -> tuple[str, str]:
        left, _, right = text.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"{text!r} is not a pair of tokens", field="tokenizer.ggml.merges", value=text)
        return left, right
