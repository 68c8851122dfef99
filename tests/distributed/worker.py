"""What each rank of a launch runs: every layout of this world size, one after another; the main rank writes results.

torchrun --nproc-per-node N worker.py MODELS OUT [NAME ...]        only these layouts
"""

import nothing_compiled  # noqa: F401

# isort: split
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file
from small_run import BEGUN, LAYOUTS, SEED, Layout, config, pairs, sequences

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.training.batch import TokenSequence, context_part, padded_batch
from srlm_mega.training.context_parallel import cp_positions
from srlm_mega.training.model import build_model, transformer_config
from srlm_mega.training.reference_logprobs import compute_reference
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.trainer import TrainingJob, TrainingPart, train_dpo, train_sft
from srlm_mega.training.weights import load_weights, save_weights, verify_export

Results = dict[str, Any]


def main(models: Path, out: Path, names: Sequence[str]) -> None:
    """All layouts of the world that was launched, or those named."""
    single = Layout("")
    with process_group(config(single, 1).trainer):
        world_size = torch.distributed.get_world_size()
        layouts = [layout for layout in LAYOUTS[world_size] if not names or layout.name in names]
        results = {layout.name: run(layout, world_size, models, out / layout.name) for layout in layouts}
        results["megatron-core"] = megatron.core.__version__
        if BEGUN in names:
            begin(models, out / BEGUN)
        if world_size == 1 and not names:
            results["refusals"] = refusals(models, out)
        if world_size == 2 and not names:
            results["determinism"] = determinism(models, out)
        if torch.distributed.get_rank() == 0:
            (out / "results.json").write_text(json.dumps(results))


def run(layout: Layout, world_size: int, models: Path, out: Path) -> Results:
    """Round trip of the weights, logits, five SFT steps, reference log-probabilities and five DPO steps."""
    settings, start = config(layout, world_size), models / layout.model
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        save_logits(topology, settings, start, out)
        train_sft(TrainingJob(topology, settings, start, out / "sft", SEED), settings.sft, sequences())
        reference = compute_reference(topology, settings, start, pairs())
        train_dpo(TrainingJob(topology, settings, start, out / "dpo", SEED), pairs(), reference)
        if not topology.is_main:
            return {}
        return {
            "sft": read_metrics(out / "sft"),
            "dpo": read_metrics(out / "dpo"),
            "reference": [asdict(record) for record in reference],
        }


def begin(models: Path, out: Path) -> None:
    """Three of the five SFT steps, with the distributed optimizer, and a checkpoint."""
    settings = config(Layout("", distributed_optimizer=True), 1)
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        part = TrainingPart(3, out / "export")
        train_sft(TrainingJob(topology, settings, models / "start", out, SEED, part=part), settings.sft, sequences())


def save_logits(topology: Topology, settings: Config, start: Path, out: Path) -> None:
    """Load, write the weights out again, and save the logits of the first four sequences to `logits.pt` [4, s, v]."""
    shape = read_shape(start)
    model = build_model(transformer_config(shape, settings.sft, settings, topology), shape, topology)
    load_weights(model, shape, start, topology)
    save_weights(model, shape, out / "round_trip", start, topology)
    for chunk in model:
        chunk.eval()
    whole = padded_batch(sequences()[:4], 4, 32)
    batch = context_part(whole, topology.cp_rank, topology.cp_size)

    def forward_step(data: object, chunk: Any) -> Any:
        logits = chunk(batch.tokens, batch.position_ids, None, runtime_gather_output=True)[..., : shape.vocab_size]
        return logits, lambda logits, non_loss_data: logits

    # The interleaved schedule wants as many micro batches as there are stages.
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(model) if len(model) > 1 else None,
            model=model,
            num_microbatches=topology.pp_size,
            seq_length=32,
            micro_batch_size=4,
            forward_only=True,
            collect_non_loss_data=True,
        )
    logits = torch.zeros(4, 32, shape.vocab_size)
    if topology.pp_rank == topology.pp_size - 1 and topology.tp_rank == topology.dp_rank == 0:
        logits[:, cp_positions(32, topology.cp_rank, topology.cp_size)] = outputs[0].float()
    logits = topology.sum_over_world(logits)
    if topology.is_main:
        torch.save(logits, out / "logits.pt")


def determinism(models: Path, out: Path) -> Results:
    """Hashes of the weights of three trainings with dropout on TP2: the same seed twice, then another."""
    settings = config(Layout("", tp=2), 2, attention_dropout=0.1, hidden_dropout=0.1)
    hashes = []
    for number, seed in enumerate((SEED, SEED, SEED + 1)):
        folder = out / f"determinism_{number}"
        with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
            train_sft(TrainingJob(topology, settings, models / "start", folder, seed), settings.sft, sequences())
            if topology.is_main:
                hashes.append(hashlib.sha256((folder / "huggingface/model.safetensors").read_bytes()).hexdigest())
    return {"hashes": hashes}


def refusals(models: Path, out: Path) -> Results:
    """What the trainer says to input that does not fit, in a single process."""
    settings = config(Layout(""), 1)
    messages = {}
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        reference = compute_reference(topology, settings, models / "other", pairs())
        try:
            train_dpo(TrainingJob(topology, settings, models / "start", out / "wrong", SEED), pairs(), reference)
        except UserError as error:
            messages["reference of another model"] = str(error)
        exploding = config(Layout(""), 1, lr=1e20, min_lr=1e20)
        try:
            job = TrainingJob(topology, exploding, models / "start", out / "explodes", SEED)
            train_sft(job, exploding.sft, sequences())
        except CannotContinue as stop:
            messages["not finite"] = str(stop)
        long = TokenSequence("long", tuple(range(40)), 1)
        job = TrainingJob(topology, settings, models / "start", out / "too_long", SEED)
        summary = train_sft(job, settings.sft, [*sequences(), long])
        messages["altered export"] = altered_export(topology, settings, models / "start", out / "altered")
    assert math.isfinite(read_metrics(out / "too_long")[-1]["loss"])
    return {
        "messages": messages,
        "excluded": summary.excluded,
        "verified": summary.verified,
        "exported": (out / "explodes/huggingface").exists(),
    }


def altered_export(topology: Topology, settings: Config, start: Path, folder: Path) -> str:
    """What is said when a number of an export is not the trained one."""
    shape = read_shape(start)
    model = build_model(transformer_config(shape, settings.sft, settings, topology), shape, topology)
    load_weights(model, shape, start, topology)
    save_weights(model, shape, folder, start, topology)
    verify_export(model, shape, folder, topology)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        verify_export(model, shape, folder, topology)
    except CannotContinue as stop:
        return str(stop)
    return ""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, one dictionary per step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
