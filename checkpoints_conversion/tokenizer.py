"""Llama's SentencePiece model -> a `tokenizers` tokenizer with the same token ids.

transformers 5 derives the merges of such a model from the order of its ids. The whitespace runs of Llama 2 have low ids
and the lowest scores, so indented text got other ids than from SentencePiece. Here scores decide.
"""

from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import generate_merges

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"


def tokenizer_from_sentencepiece(model_file: Path) -> Tokenizer:
    """Return a tokenizer with the ids of a SentencePiece model. ValueError when its special tokens are not Llama's."""
    pieces = SentencePieceProcessor(model_file=str(model_file))
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    specials = tuple(pieces.id_to_piece(index) for index in range(3))
    if specials != SPECIAL_TOKENS:
        raise ValueError(f"{model_file}: the first pieces must be {SPECIAL_TOKENS}, got {specials}: give Llama's")
    scores = {piece: pieces.get_score(index) for piece, index in vocab.items() if piece not in SPECIAL_TOKENS}
    tokenizer = sentencepiece_bpe(vocab, scores, "<unk>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def sentencepiece_bpe(
    vocab: Mapping[str, int], scores: Mapping[str, float], unknown: str, add_space_prefix: bool = True
) -> Tokenizer:
    """Return a tokenizer that merges as SentencePiece does, without special tokens. `scores` are those of the pieces
    that texts may become; the rest of `vocab` is never made of others."""
    merges = generate_merges({piece: vocab[piece] for piece in scores}, scores)
    tokenizer = Tokenizer(BPE(dict(vocab), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix, strip = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if add_space_prefix else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
