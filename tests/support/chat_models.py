"""Models with a chat format, as their makers publish them: a byte-level tokenizer with special tokens after the
vocabulary, a list of end tokens, a chat template; and a small Llama 3.2 to go with it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.chat.chat_template import shipped_template
from srlm_mega.chat.tokenizer_files import SpecialTokens, write_tokenizer

LLAMA3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>",
)  # fmt: skip
BEGIN_OF_TEXT, END_OF_TEXT, _, _, END_OF_TURN, *_ = LLAMA3_TOKENS


def byte_level_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE such as Llama 3's, with no token for the unknown, of at most this many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), vocab_size - len(LLAMA3_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_TOKENS])
    return tokenizer


def write_byte_level(tokenizer: Tokenizer, folder: Path, template: str) -> Path:
    """Write such a tokenizer's files, with Llama 3's two end tokens."""
    special, ends = SpecialTokens(BEGIN_OF_TEXT, END_OF_TEXT), end_ids(tokenizer)
    write_tokenizer(tokenizer, folder, 4096, special, template, ends)
    return folder


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the end of a text and of a turn, in the order in which Llama 3's files list them."""
    return [int(tokenizer.token_to_id(token)) for token in (END_OF_TEXT, END_OF_TURN)]


def save_llama_3_2(folder: Path, tokenizer: Tokenizer) -> Path:
    """Write a tied model of random fp32 weights, with this tokenizer. Its heads can be split over 2 or 3 ranks; of a
    head's four wavelengths two are left as they are, one is stretched in part and one in full."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=96,
        intermediate_size=96,
        num_attention_heads=12,
        num_key_value_heads=6,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        bos_token_id=tokenizer.token_to_id(BEGIN_OF_TEXT),
        eos_token_id=end_ids(tokenizer),
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return write_byte_level(tokenizer, folder, shipped_template("llama3"))


def messages(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins, as transformers takes it."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def theirs(tokenizer: Any, conversation: Sequence[dict[str, str]], answer_follows: bool = True) -> tuple[int, ...]:
    """The ids of transformers' `apply_chat_template`."""
    ids = tokenizer.apply_chat_template(list(conversation), add_generation_prompt=answer_follows, tokenize=True)
    return tuple(ids["input_ids"])
