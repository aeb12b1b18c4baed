"""SentencePiece BPE (Llama 1 and 2, Mistral 7B): pieces with scores, as merges that the tokenizers library knows.

SentencePiece joins the two neighbours whose joint piece has the highest score, the leftmost of equals, until no two
neighbours make a piece. The library joins the pair that comes first in a list, the leftmost of equals. So the list is
every way to cut a piece into two, the best-scored piece first. Where two pieces have the same score the one would go by
place and the other by list, and the file is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

from stagecoach.errors import CheckpointError

SPACE = "▁"
# Every way to cut a piece is looked at. SentencePiece itself makes none of more than 16 unless it is told to.
MAX_PIECE_CHARACTERS = 256


def merges_of(scored: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges that make text into `scored` pieces.

    Raises CheckpointError for scores that are equal, and for a piece of more than MAX_PIECE_CHARACTERS.
    """
    longest = max((len(piece) for piece, _ in scored), default=0)
    if longest > MAX_PIECE_CHARACTERS:
        raise CheckpointError(
            f"a piece has {longest} characters",
            field="tokenizer.ggml.tokens",
            limit=MAX_PIECE_CHARACTERS,
            value=longest,
        )
    order = {piece: index for index, (piece, _) in enumerate(scored)}
    merges: list[tuple[str, str]] = []
    last: tuple[str, float] | None = None
    for piece, score in sorted(scored, key=lambda entry: -entry[1]):
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        possible = [(left, right) for left, right in cuts if left in order and right in order]
        if not possible:
            continue
        if last is not None and last[1] == score:
            raise CheckpointError(
                f"pieces {last[0]!r} and {piece!r} have the same score, which a list of merges cannot say",
                field="tokenizer.ggml.scores",
                value=score,
            )
        last = (piece, score)
        merges += sorted(possible, key=lambda pair: (order[pair[0]], order[pair[1]]))
    return merges


def sentence_piece_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, *, adds_space: bool
) -> Tokenizer:
    """`adds_space`: a space is put before the text, and before text after a special token, and taken off again."""
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if adds_space else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return tokenizer
