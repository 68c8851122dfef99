"""What each of four processes runs on stories260K: logits, a greedy story and a DPO step at TP 1, 2 and 4.

torchrun --nproc-per-node 4 stories_worker.py START PAIRS OUT; the main rank writes OUT/results.json.
"""

import nothing_compiled  # noqa: F401

# isort: split
import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from stories_run import NUM_NEW_TOKENS, SEED, TENSOR_PARALLEL_SIZES, config, read_pairs
from torch import Tensor

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.training.batch import PairSequences, TokenSequence, padded_batch
from srlm_mega.training.model import build_model, transformer_config
from srlm_mega.training.reference_logprobs import compute_reference
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.trainer import TrainingJob, train_dpo
from srlm_mega.training.weights import load_weights


def main(start: Path, pairs_file: Path, out: Path) -> None:
    """All three layouts, one after another; what TP leaves of the four processes is data parallel."""
    pairs = read_pairs(pairs_file)
    with process_group(config(1).trainer):
        results = {f"TP{tp}": run(config(tp), start, pairs, out / f"TP{tp}") for tp in TENSOR_PARALLEL_SIZES}
        if torch.distributed.get_rank() == 0:
            (out / "results.json").write_text(json.dumps(results))


def run(settings: Config, start: Path, pairs: list[PairSequences], out: Path) -> dict[str, Any]:
    """The layout's story, the logits of it [s, v], and the metrics of its DPO step."""
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        shape = read_shape(start)
        (model,) = build_model(transformer_config(shape, settings.dpo, settings, topology), shape, topology)
        load_weights([model], shape, start, topology)
        model.eval()
        story = [1]
        for _ in range(NUM_NEW_TOKENS):
            logits = logits_of(model, story, topology)
            story.append(int(logits[-1].argmax()))
        reference = compute_reference(topology, settings, start, pairs)
        train_dpo(TrainingJob(topology, settings, start, out, SEED), pairs, reference)
        if not topology.is_main:
            return {}
        (metrics,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return {"story": story, "logits": logits.tolist(), "dpo": metrics}


@torch.no_grad()
def logits_of(model: MegatronModule, ids: list[int], topology: Topology) -> Tensor:
    """[s, v], the vocabulary gathered over the tensor-parallel ranks."""
    batch = padded_batch([TokenSequence("story", (*ids, 0), 0)], 1, len(ids))
    logits: Tensor = model(batch.tokens, batch.position_ids, None, runtime_gather_output=True)
    return logits[0]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
