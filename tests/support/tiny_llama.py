"""A Llama of four tiny layers, and what it takes to build its trainer without a run."""

from typing import Any

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config import Config

SHAPE = LlamaShape(4, 32, 48, 4, 2, 64, 64, 1e-5, 10000.0, False)
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "seq_length": 32,
}


def training_config(processes: int, bf16: bool = False, **parallel: Any) -> Config:
    """Of so many processes on a CPU; `parallel` is the section of this name."""
    section = {"train_iters": 1, "global_batch_size": 4, "lr": 1e-3, "min_lr": 1e-4}
    few_tokens = {"max_new_tokens": 4}
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": MODEL,
            "seed_data": {"source": "toy_world"},
            "sft": section,
            "dpo": section,
            "trainer": {"device": "cpu", "bf16": bf16},
            "parallel": parallel,
            "launch": {"processes_per_node": processes},
            "candidates": few_tokens,
            "judge": few_tokens,
            "prompts": few_tokens,
        }
    )
