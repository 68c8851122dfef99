"""Model folders as other programs leave them: written by transformers, with the toy's tokenizer."""

from pathlib import Path
from typing import Any

import orjson
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.chat.tokenizer_files import write_tokenizer
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer

PLAIN: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Like Llama 3.2: tied, and the rotary wavelengths stretched; with an embedding that is larger than the tokenizer.
LLAMA_3: dict[str, Any] = PLAIN | {
    "tie_word_embeddings": True,
    "vocab_size": 131,
    "max_position_embeddings": 16384,
    "rope_parameters": {
        "rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
# Their shapes as published, by what a config.json of transformers 4 says.
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}  # fmt: skip


def save_model(folder: Path, settings: dict[str, Any] = PLAIN, std: float = 0.1) -> Path:
    """Write a model of random fp32 weights, as transformers saves it, and the toy's tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(initializer_range=std, bos_token_id=1, eos_token_id=2, **settings))
    model.save_pretrained(folder)
    write_tokenizer(toy_tokenizer(), folder, settings["max_position_embeddings"])
    return folder


def write_config(folder: Path, settings: dict[str, Any]) -> Path:
    """Write a folder with a `config.json` alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(orjson.dumps(settings))
    return folder


def change_config(folder: Path, **changes: object) -> None:
    """Change keys of a folder's `config.json`."""
    file = folder / "config.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | changes))


def add_token(folder: Path) -> int:
    """Add a token to a folder's tokenizer, as `add_tokens` without `resize_token_embeddings` does; return its id."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["beyond"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.token_to_id("beyond"))
