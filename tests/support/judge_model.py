"""A Llama that says `Verdict : A` to whatever it is asked: a table of which token follows which, as weights."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from srlm_mega.chat.tokenizer_files import write_tokenizer
from srlm_mega.checkpoints_conversion.huggingface import write_folder
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.random_weights import random_weights

UNK, BOS, EOS, OPEN_USER, CLOSE_USER = "<unk>", "<s>", "</s>", "[INST]", "[/INST]"
WORDS = (UNK, BOS, EOS, OPEN_USER, CLOSE_USER, "Verdict", ":", "A")
FOLLOWS = ((CLOSE_USER, "Verdict"), ("Verdict", ":"), (":", "A"), ("A", EOS))


def write_always_a(folder: Path) -> None:
    """Attention and MLP add nothing, so the last token alone decides the next one."""
    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (UNK, BOS, EOS, OPEN_USER, CLOSE_USER)])
    shape = LlamaShape(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=16,
        num_attention_heads=1,
        num_query_groups=1,
        vocab_size=16,
        max_position_embeddings=2048,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
        tie_word_embeddings=False,
    )
    weights = random_weights(shape, 0.3, torch.Generator().manual_seed(0))
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    weights["model.embed_tokens.weight"] = torch.eye(16)
    head = torch.zeros(16, 16)
    for before, after in FOLLOWS:
        head[ids[after], ids[before]] = 1.0
    weights["lm_head.weight"] = head
    folder.mkdir(parents=True)
    write_tokenizer(tokenizer, folder, shape.max_position_embeddings)
    write_folder(folder, shape, weights, tokenizer_from=None)
