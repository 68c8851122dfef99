"""Llama's SentencePiece model -> a `tokenizers` tokenizer with the same token ids.

transformers 5 derives the merges of such a model from the order of its ids. The whitespace runs of Llama 2 have low ids
and the lowest scores, so indented text got other ids than from SentencePiece. Here scores decide.
"""

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
    merges = generate_merges(vocab, scores)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
