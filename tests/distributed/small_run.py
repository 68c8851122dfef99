"""A tiny model's training run, for every layout: config, sequences and pairs. Deterministic, no torch."""

import random
from dataclasses import dataclass
from typing import Literal

from srlm_mega.config import Config
from srlm_mega.training.batch import PairSequences, TokenSequence

NUM_LAYERS, VOCAB_SIZE, SEQ_LENGTH = 4, 61, 32
SEED, STEPS, BATCH = 5, 5, 8


@dataclass(frozen=True)
class Layout:
    """A way to spread the run over processes; `model` names the folder it starts from."""

    name: str
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    cp: int = 1
    recompute: Literal["full", "selective"] | None = None
    bf16: bool = False
    micro_batch_size: int = 2
    packed: bool = False
    model: str = "start"


LAYOUTS = {
    1: (
        Layout("single"),
        Layout("single, one micro batch", micro_batch_size=8),
        Layout("single, packed", packed=True),
        Layout("single, full recompute", recompute="full"),
        Layout("single, bf16", bf16=True),
        Layout("single, tied", model="tied"),
    ),
    2: (
        Layout("TP2", tp=2),
        Layout("TP2, sequence parallel", tp=2, sequence_parallel=True),
        Layout("TP2, sequence parallel, packed", tp=2, sequence_parallel=True, packed=True),
        Layout("PP2", pp=2),
        Layout("PP2 x VPP2", pp=2, vpp=2),
        Layout("PP2 x VPP2, packed", pp=2, vpp=2, packed=True),
        Layout("DP2, distributed optimizer", distributed_optimizer=True),
        Layout("DP2, distributed optimizer, overlaps", distributed_optimizer=True, overlap=True),
        Layout("PP2, tied", pp=2, model="tied"),
        Layout("CP2", cp=2),
    ),
    4: (
        Layout("TP2 x PP2", tp=2, pp=2),
        Layout("PP2 x DP2, packed", pp=2, packed=True),
        Layout("TP2 x DP2, sequence parallel, distributed optimizer, selective recompute", tp=2,
               sequence_parallel=True, distributed_optimizer=True, recompute="selective"),
    ),
    8: (
        Layout("TP2 x PP2 x DP2, sequence parallel, distributed optimizer", tp=2, pp=2,
               sequence_parallel=True, distributed_optimizer=True),
        Layout("TP2 x PP2 x VPP2 x DP2, sequence parallel, distributed optimizer, overlaps, full recompute", tp=2, pp=2,
               vpp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, recompute="full"),
    ),
}  # fmt: skip
BEGUN = "begun"  # a training of a single process that another launch resumes
NAMES = [layout.name for layouts in LAYOUTS.values() for layout in layouts]


def config(layout: Layout, world_size: int, **section: float) -> Config:
    """The run's config; `section` changes both training sections."""
    training = {
        "train_iters": STEPS,
        "micro_batch_size": layout.micro_batch_size,
        "packed_sequence_size": 2 * SEQ_LENGTH if layout.packed else None,
        "packs": "auto" if layout.packed and layout.pp > 1 else "fewest",
        "global_batch_size": BATCH,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "weight_decay": 0.1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    } | section
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": NUM_LAYERS,
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": VOCAB_SIZE,
                "seq_length": SEQ_LENGTH,
                "max_position_embeddings": 64,
            },
            "seed_data": {"source": "toy_world"},
            "sft": training,
            "dpo": training | {"rpo_alpha": 0.3},
            "parallel": {
                "tensor_model_parallel_size": layout.tp,
                "pipeline_model_parallel_size": layout.pp,
                "virtual_pipeline_model_parallel_size": layout.vpp,
                "context_parallel_size": layout.cp,
                "sequence_parallel": layout.sequence_parallel,
                "use_distributed_optimizer": layout.distributed_optimizer,
                "overlap_grad_reduce": layout.overlap,
                "overlap_param_gather": layout.overlap,
            },
            "trainer": {"device": "cpu", "bf16": layout.bf16, "recompute_granularity": layout.recompute},
            "launch": {"processes_per_node": world_size},
            "candidates": {"max_new_tokens": 8},
            "judge": {"max_new_tokens": 8},
            "prompts": {"max_new_tokens": 8},
        }
    )


def sequences() -> list[TokenSequence]:
    """19 sequences of 5 to 30 tokens with prompts of 0 to 4: the loss masks are uneven."""
    rng = random.Random(0)
    return [_sequence(rng, f"s{number}", rng.randint(0, 4)) for number in range(19)]


def pairs() -> list[PairSequences]:
    """11 pairs, chosen and rejected of different lengths: more than one batch, the second not full."""
    rng = random.Random(1)
    made = []
    for number in range(11):
        chosen, other = (_sequence(rng, f"p{number}/{side}", 3) for side in ("chosen", "rejected"))
        rejected = TokenSequence(other.id, chosen.tokens[:3] + other.tokens[3:], 3)
        made.append(PairSequences(f"p{number}", chosen, rejected))
    return made


def _sequence(rng: random.Random, name: str, num_prompt: int) -> TokenSequence:
    tokens = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(5, 30)))
    return TokenSequence(name, tokens, num_prompt)
