"""How byte-level BPE tokenizers cut text into words before they merge: one recipe for each `tokenizer.ggml.pre`.

The recipes are those of the models' own tokenizer.json. "default" is what llama.cpp does when its converter did not
recognise the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from stagecoach.errors import CheckpointError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class ByteLevelRecipe:
    """`patterns` cut the text one after the other, each within the pieces that the one before left.

    `ignore_merges`: a word that is a token as a whole is that token, whatever the merges. `adds_bos`: what holds where
    the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def tokenizer(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        """A tokenizer that cuts text, spells its bytes in printable characters as tokens do, and merges."""
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=self.ignore_merges))
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, spelling])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer


_RECIPES = {
    "gpt-2": ByteLevelRecipe((_GPT2,)),
    "smollm": ByteLevelRecipe((r"\p{N}", _GPT2)),
    "llama-bpe": ByteLevelRecipe((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "llama3": ByteLevelRecipe((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "qwen2": ByteLevelRecipe((_QWEN2,), nfc=True),
    "default": ByteLevelRecipe((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def byte_level_recipe(name: str) -> ByteLevelRecipe:
    """The recipe for `tokenizer.ggml.pre`; CheckpointError for one we do not know, as a guess gives wrong tokens."""
    recipe = _RECIPES.get(name)
    if recipe is None:
        raise CheckpointError(
            f"tokenizer.ggml.pre {name!r} is not known",
            field="tokenizer.ggml.pre",
            limit=", ".join(_RECIPES),
            value=name,
        )
    return recipe
