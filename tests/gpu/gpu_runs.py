"""Short trainings of models with a few layers of a large model's width, on a GPU or, shrunken, on a CPU."""

import gc
from dataclasses import dataclass
from typing import Any, Literal

import torch

from srlm_mega.config import Config
from srlm_mega.tools.bench_training import Bench, TrainingRequest
from srlm_mega.training.device import peak_memory
from srlm_mega.training.topology import Topology

Device = Literal["cpu", "cuda"]
Figures = dict[str, dict[str, Any]]  # name of a measurement -> what was measured
SEED, STEPS = 0, 20


@dataclass(frozen=True)
class Size:
    """A model and its batch; `lr` is large enough for its loss on one repeated batch to fall in a few steps."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int
    lr: float


WIDE_70B = Size("1 layer of 70B", 1, 8192, 28672, 64, 8, 32000, 1024, 1e-4)
WIDE_7B = Size("4 layers of 7B", 4, 4096, 11008, 32, 32, 32000, 1024, 1e-4)
SHRUNKEN = Size("shrunken", 2, 64, 128, 4, 2, 128, 32, 3e-3)


def run_config(size: Size, device: Device, **trainer: Any) -> Config:
    """Batches of 8 packed sequences or pairs; dropout is off, so that runs can be compared. `trainer` is the section's,
    but for `layer_backend`, which is the model's."""
    backend = trainer.pop("layer_backend", "auto")
    section = {
        "train_iters": STEPS,
        "global_batch_size": 8,
        "packed_sequence_size": 4 * size.seq_length,
        "lr": size.lr,
        "min_lr": size.lr,
        "lr_decay_style": "constant",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    model = {field: value for field, value in vars(size).items() if field not in ("name", "lr")}
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": model | {"max_position_embeddings": size.seq_length, "layer_backend": backend},
            "seed_data": {"source": "toy_world"},
            "sft": section,
            "dpo": section,
            "trainer": {"device": device} | trainer,
            "candidates": {"max_new_tokens": 4},
            "judge": {"max_new_tokens": 4},
            "prompts": {"max_new_tokens": 4},
        }
    )


def fresh_device() -> None:
    """Let go of the models before, which hooks keep in circles (25 GB each), and of their peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sft_losses(config: Config) -> list[float]:
    """Losses of 20 SFT steps on one repeated batch."""
    fresh_device()
    with Topology.start(config.parallel, config.trainer, SEED) as topology:
        bench = Bench(
            config, TrainingRequest("sft", steps=1, warmup=0, baseline=False, baseline_size=None, json=None), topology
        )
        step = bench.objective.prepare(bench.indices(0))
        return [bench.trainer.step(bench.objective, step, number)["loss"] for number in range(1, STEPS + 1)]


def dpo_step(config: Config, steps: int, warmup: int) -> dict[str, float]:
    """Medians of DPO steps on random pairs: seconds, rates, MFU where the device's peak is known; peak memory."""
    fresh_device()
    with Topology.start(config.parallel, config.trainer, SEED) as topology:
        bench = Bench(
            config,
            TrainingRequest("dpo", steps=steps, warmup=warmup, baseline=False, baseline_size=None, json=None),
            topology,
        )
        samples = bench.time_steps()
        rates = {key: torch.tensor([row[key] for row in samples.metrics]).median().item() for key in samples.metrics[0]}
        seconds = torch.tensor(samples.seconds).median().item()
        return rates | peak_memory(topology) | {"step_seconds": seconds}


def largest_gap(losses: list[float], truth: list[float]) -> float:
    """Largest difference of two trajectories, as a share of what the true one fell by."""
    fall = truth[0] - min(truth)
    return max(abs(one - other) for one, other in zip(losses, truth, strict=True)) / fall
