"""Text to tokens and back, for one checkpoint, as transformers' AutoTokenizer does it."""

from __future__ import annotations

import enum
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import tokenizers
from tokenizers import AddedToken

from stagecoach.errors import CheckpointError, InvalidArgument, OutOfRange
from stagecoach_router.text.detokenizer import IncrementalDetokenizer, TokenSpelling, text_decoder
from stagecoach_router.text.least_tokens import least_tokens
from stagecoach_router.text.model_files import ModelFiles, named_tokens

# How long a text may be for each token that there is room for, where a vocabulary has no bound that surely holds.
MAX_CHARACTERS_PER_TOKEN = 64

# The library would have a thread for each core of the machine, for batches; ours are of one text. It looks at this
# whenever it encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TextKind(enum.Enum):
    """What a text is, by the field that it came in."""

    PROMPT = "prompt"  # gets what tokenizer.json puts around one, such as bos
    CHAT = "messages"  # a rendered conversation: its special tokens are written in it, and none are added


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a text came to. `token_ids` is None where there are more tokens than were wanted."""

    num_tokens: int
    token_ids: list[int] | None = field(repr=False)


class Tokenizer:
    """One checkpoint's tokenizer. Safe to use from several threads.

    `vocab_size` is the number of logits the model gives; ids from `num_known_ids` on are padding without text.
    `eos_token_ids` are all that generation_config.json, config.json and tokenizer_config.json name.
    Raises CheckpointError where the checkpoint's files are missing or broken.
    """

    def __init__(self, files: ModelFiles) -> None:
        saved = files.json("tokenizer.json")
        self._tokenizer = _load(files)
        named = named_tokens(files)
        self._mark_special(list(named.values()))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._least_tokens = least_tokens(saved, list(added.values()))
        decoder = saved.get("decoder")
        self._decoders = {skips: text_decoder(decoder, self._spelling(skips)) for skips in (True, False)}
        config = files.json("config.json")
        self.num_known_ids: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size: int = _positive(config.get("vocab_size"), default=self.num_known_ids)
        self.eos_token_ids: frozenset[int] = frozenset(
            [
                *_ids(files.json("generation_config.json").get("eos_token_id")),
                *_ids(config.get("eos_token_id")),
                *_ids(self._token_id(named.get("eos_token"))),
            ]
        )

    def encode_within(self, text: str, max_tokens: int, kind: TextKind) -> Encoded:
        """All tokens of a text, unless there are more than `max_tokens`: a list of a million takes some 30 ms to make.

        Nothing else of Python runs in that time, while it does where the library encodes. As with transformers,
        `add_bos_token` in tokenizer_config.json has no say where there is a tokenizer.json. Raises InvalidArgument for
        what is no text.
        """
        encoding = self._encode(text, kind)
        num_tokens = len(encoding)
        return Encoded(num_tokens, encoding.ids if num_tokens <= max_tokens else None)

    def check_length(self, text: str, max_tokens: int, kind: TextKind) -> None:
        """Raises OutOfRange for a text that cannot be of `max_tokens` tokens, which is told from its bytes.

        Where nothing certain can be told of a vocabulary, that is a text of more than 64 characters for each of them.
        """
        if self._least_tokens is not None:
            num_tokens = self._least_tokens.of(text, enough=max_tokens)
            if num_tokens > max_tokens:
                reason = f"{kind.value}: at least {num_tokens} tokens; the context has room for {max_tokens}"
                raise OutOfRange(reason, field=kind.value, limit=max_tokens, value=num_tokens)
        elif len(text) > MAX_CHARACTERS_PER_TOKEN * max_tokens:
            limit = MAX_CHARACTERS_PER_TOKEN * max_tokens
            raise OutOfRange(
                f"{kind.value}: {len(text)} characters; for a context of {max_tokens} tokens there may be {limit}",
                field=kind.value,
                limit=limit,
                value=len(text),
            )

    def token_text(self, token_id: int) -> str:
        """One token as it reads in the midst of text; U+FFFD where it is part of a character, "" for an unknown id."""
        return self._decoders[False].token_text(token_id)

    def prompt_tail(self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True) -> tuple[int, ...]:
        """Of a prompt, all that can matter to the text of what follows: its last tokens with text, up to four.

        Three of them hold the bytes of a character that is not finished, and one more shows that something came before.
        """
        spelling, num_known = self._spelling(skip_special_tokens), self.num_known_ids
        left_out: frozenset[int] = self._special_ids if skip_special_tokens else frozenset()
        perhaps = (
            token_id for token_id in reversed(prompt_tokens) if token_id not in left_out and token_id < num_known
        )
        return tuple(itertools.islice(filter(spelling, perhaps), 4))[::-1]

    def detokenizer(
        self, prompt_tokens: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """The text of one completion: of the tokens that follow `prompt_tokens`."""
        return self._decoders[skip_special_tokens].start(prompt_tokens)

    def _spelling(self, skip_special_tokens: bool) -> TokenSpelling:
        tokenizer, special_ids = self._tokenizer, self._special_ids

        def spelling(token_id: int) -> str | None:
            if skip_special_tokens and token_id in special_ids:
                return None
            token: str | None = tokenizer.id_to_token(token_id)
            return token

        return spelling

    def _encode(self, text: str, kind: TextKind) -> tokenizers.Encoding:
        # Not `encode`, which keeps the interpreter's lock to its end; and without offsets it takes two thirds as long.
        try:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=kind is TextKind.PROMPT)[0]
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidArgument(f"{kind.value} is not text: {error}", field=kind.value) from error

    def _mark_special(self, tokens: Sequence[str]) -> None:
        """Tells the library of tokens that only tokenizer_config.json calls special, if they have an id already."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        missing = [token for token in dict.fromkeys(tokens) if token not in known and self._token_id(token) is not None]
        self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])

    def _token_id(self, token: str | None) -> int | None:
        token_id: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return token_id


def _load(files: ModelFiles) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises the bare class
        raise CheckpointError(f"tokenizer.json cannot be read: {error}", field="tokenizer.json") from error
    # They may be saved in the file, for training. A prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(entry: object) -> list[int]:
    """The ids in an entry that is one id, a list of them, or absent."""
    items = entry if isinstance(entry, list) else [entry]
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool)]


def _positive(entry: object, *, default: int) -> int:
    return entry if isinstance(entry, int) and not isinstance(entry, bool) and entry > 0 else default
