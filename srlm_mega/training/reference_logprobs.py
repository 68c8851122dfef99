"""Log-probabilities of pairs under a round's starting model: one forward pass, before the first update."""

from collections.abc import Sequence
from pathlib import Path

import torch

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.kernels.reference import segment_sums
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import PairSequences
from srlm_mega.training.fp8_recipe import precision_before_training
from srlm_mega.training.metrics import Report
from srlm_mega.training.model import build_model, transformer_config
from srlm_mega.training.schedule import forward
from srlm_mega.training.split import split, within
from srlm_mega.training.topology import Topology
from srlm_mega.training.weights import load_weights


def compute_reference(
    topology: Topology, config: Config, start: Path, pairs: Sequence[PairSequences], report: Report | None = None
) -> list[ReferenceLogprobs]:
    """Return the responses' summed log-probabilities (nats) under the model in the Hugging Face folder `start`.

    One record per pair, in their order, the same list on every rank. Dropout is off; with delayed FP8 scales, which no
    pass has set yet, so is FP8. Pairs longer than `model.seq_length` have no record: training leaves them out too.
    `report` is called on the main rank after each batch.
    """
    pairs = within(pairs, config.model.seq_length)
    section, shape = config.dpo, read_shape(start)
    model = build_model(transformer_config(shape, section, config, topology), shape, topology)
    load_weights(model, shape, start, topology)
    for chunk in model:
        chunk.eval()

    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for first in range(0, len(pairs), section.global_batch_size):
        topology.beat("step", f"reference, pairs from {first}")
        items = pairs[first : first + section.global_batch_size]
        cut = split(items, section, topology)
        batches = cut.batches(shape.vocab_size)
        with precision_before_training(model, config.trainer):
            outputs = forward(model, batches)
        for part, batch, token_logps in zip(cut.micro_batches, batches, outputs, strict=topology.is_reporter):
            if topology.is_reporter:
                logps[[first + place for place in part]] = (
                    segment_sums(token_logps.double(), batch.cu_seqlens).view(-1, 2).cpu()
                )
        if report is not None and topology.is_main:
            report(first + len(items), len(pairs), "pairs", "")
    summed = topology.sum_over_world(logps).tolist()
    return [ReferenceLogprobs(pair.id, *values) for pair, values in zip(pairs, summed, strict=True)]
