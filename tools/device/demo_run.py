"""`srlm bench device`: the demo's loop at small size on the GPU, with the `huggingface` sampler; seconds and rates of
each stage. Trainer and sampler share the one device."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from srlm_mega.config.file import load_config
from srlm_mega.launch.child_process import die_with, srlm_command
from srlm_mega.report.costs import stage_costs
from srlm_mega.run.run_dir import RunDir
from srlm_mega.tools.bench_kernels import find_device
from srlm_mega.tools.bench_record import BenchRecord, make_record, make_row, table, write_record
from srlm_mega.tools.device.first_call import gpu_name

SMALL = [
    "run.rounds=1", "parallel.pipeline_model_parallel_size=1", "launch.processes_per_node=1",
    "seed_data.num_documents=3000", "seed_data.num_ift=200", "seed_data.num_eft=200", "seed_data.num_eft_eval=80",
    "seed_data.num_validation=40", "prompts.per_round=40", "dpo.global_batch_size=8", "evaluation.judge_replicates=1",
]  # fmt: skip
ON_GPU = ["trainer.device=cuda", "sampler.device=cuda", "pretrain.train_iters=120",
          "sft.train_iters=60", "dpo.train_iters=6"]  # fmt: skip
# An untrained model writes no readable judgement, so the judge is random; M1 has to know what a prompt looks like.
SMOKE = ["judge.backend=random", "pretrain.train_iters=20", "sft.train_iters=4", "dpo.train_iters=1",
         "dpo.global_batch_size=2", "prompts.per_round=8", "seed_data.num_documents=600", "seed_data.num_eft_eval=20",
         "seed_data.num_validation=8"]  # fmt: skip


def main(
    folder: Annotated[Path, typer.Argument(help="The run's folder.")],
    json: Annotated[Path, typer.Option(help="The record to write.")],
) -> None:
    """Run the small demo, and record its stages, also those of a run that failed."""
    device = find_device()
    overrides = [f"run.dir={folder}", *SMALL, *(ON_GPU if device.type == "cuda" else SMOKE)]
    die = partial(die_with, os.getpid())
    code = subprocess.run([*srlm_command(), "run", "toy_cpu", *overrides], check=False, preexec_fn=die).returncode
    record = record_of(folder, overrides, code, device)
    write_record(record, json)
    print(table(record))
    sys.exit(code)


def record_of(folder: Path, overrides: Sequence[str], code: int, device: torch.device) -> BenchRecord:
    """Return the seconds and rates of each finished stage of a run that ended with this exit code."""
    costs = stage_costs(RunDir(folder), load_config(Path("toy_cpu"), overrides))
    rows = [make_row(cost.stage.name, "s", [cost.seconds], extra={**cost.training, **cost.sampling}) for cost in costs]
    settings = {"exit_code": code, "overrides": overrides, "cuda": torch.version.cuda}
    return make_record("demo", settings, rows, ("accelerate",), gpu_name(device))


if __name__ == "__main__":
    typer.run(main)
