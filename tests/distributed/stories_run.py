"""stories260K's run, for every layout: config, sizes, and the pairs that the test hands to the launch."""

import json
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.training.batch import PairSequences, TokenSequence

TENSOR_PARALLEL_SIZES, WORLD_SIZE, SEED = (1, 2, 4), 4, 0
NUM_NEW_TOKENS = 32


def config(tp: int) -> Config:
    """stories260K's shape, and one DPO step over four pairs."""
    training = {
        "train_iters": 1,
        "global_batch_size": 4,
        "lr": 1e-4,
        "min_lr": 1e-4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": 5,
                "hidden_size": 64,
                "ffn_hidden_size": 172,
                "num_attention_heads": 8,
                "num_query_groups": 4,
                "vocab_size": 512,
                "seq_length": 512,
                "max_position_embeddings": 512,
            },
            "seed_data": {"source": "toy_world"},
            "sft": training,
            "dpo": training,
            "parallel": {"tensor_model_parallel_size": tp},
            "trainer": {"device": "cpu"},
            "launch": {"processes_per_node": WORLD_SIZE},
            "candidates": {"max_new_tokens": 8},
            "judge": {"max_new_tokens": 8},
            "prompts": {"max_new_tokens": 8},
        }
    )


def read_pairs(file: Path) -> list[PairSequences]:
    """Pairs from JSON: [[number of prompt tokens, chosen ids, rejected ids], ...]."""
    return [
        PairSequences(
            f"p{number}",
            TokenSequence(f"p{number}/chosen", tuple(chosen), num_prompt),
            TokenSequence(f"p{number}/rejected", tuple(rejected), num_prompt),
        )
        for number, (num_prompt, chosen, rejected) in enumerate(json.loads(file.read_text()))
    ]
