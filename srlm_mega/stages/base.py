"""M0 without pre-training: a given Hugging Face folder, or random weights."""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

from srlm_mega.chat import Chat
from srlm_mega.checkpoints_conversion.huggingface import read_shape, write_folder
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.random_weights import random_weights
from srlm_mega.checkpoints_conversion.tokenizer import tokenizer_from_sentencepiece, write_tokenizer
from srlm_mega.config import ModelConfig
from srlm_mega.data.toy_world.tokenizer import toy_tokenizer
from srlm_mega.errors import UserError
from srlm_mega.seeds import derive_seed
from srlm_mega.stage import Done, Work


def make_base(work: Work) -> Done:
    """`M0/huggingface`: a link to the given folder, or random weights with the configured tokenizer."""
    model = work.config.model
    if model.path is not None:
        link_folder(model, work.out / "huggingface")
    else:
        write_random(model, derive_seed(work.config.run.seed, "M0"), work.out / "huggingface")
    return Done()


def link_folder(model: ModelConfig, target: Path) -> None:
    """M0 is the user's folder; it must exist and have the configured shape."""
    assert model.path is not None
    if not (model.path / "config.json").is_file():
        raise UserError(
            f"model.path {model.path} is not a Hugging Face model folder (no config.json). "
            "Download the weights there, or set model.path to where they are."
        )
    found, wanted = asdict(read_shape(model.path)), asdict(shape_of(model))
    differing = [f"{key} is {found[key]}, configured {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if differing:
        raise UserError(f"{model.path}/config.json does not have the configured shape: " + "; ".join(differing))
    os.symlink(model.path.resolve(), target)


def write_random(model: ModelConfig, seed: int, target: Path) -> None:
    """Random weights, and the tokenizer: a given one, or the toy world's."""
    tokenizer = load_tokenizer(model)
    needed = Chat(tokenizer).vocab_size
    if needed > model.vocab_size:
        raise UserError(
            f"the tokenizer has {needed} pieces, model.vocab_size is {model.vocab_size}: set it to at least that"
        )
    write_tokenizer(tokenizer, target, model.seq_length)
    shape = shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    write_folder(target, shape, random_weights(shape, model.init_method_std, generator), tokenizer_from=None)


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """SentencePiece .model, tokenizer.json, a folder that holds one, or (none given) the toy world's."""
    path = model.tokenizer
    if path is None:
        return toy_tokenizer()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"model.tokenizer {path} does not exist: give a SentencePiece .model or a tokenizer.json")
    if path.suffix == ".model":
        return tokenizer_from_sentencepiece(path)
    return Tokenizer.from_file(str(path))


def shape_of(model: ModelConfig) -> LlamaShape:
    """The configured shape, output untied."""
    return LlamaShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        norm_epsilon=model.norm_epsilon,
        rotary_base=model.rotary_base,
        tie_word_embeddings=False,
    )
