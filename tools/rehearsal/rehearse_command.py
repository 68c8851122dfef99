"""`srlm rehearse`: a process for every rank that differs, and what they found out."""

import gc
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import orjson
import psutil

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.model_sizes import GIB
from srlm_mega.errors import USER_ERROR, UserError
from srlm_mega.gpus import GpuModel
from srlm_mega.launch.child_process import die_with, ending_children, environment, srlm_command
from srlm_mega.launch.cores import usable_cores
from srlm_mega.records import parse_line
from srlm_mega.tools.planner.training_steps import Lengths, layout_of, planned_memory, training_job
from srlm_mega.tools.rehearsal.rank_places import distinct_ranks, place_of
from srlm_mega.tools.rehearsal.rehearsal_record import RankRecord
from srlm_mega.tools.rehearsal.rehearsal_table import Rehearsed, rehearsal_json, rehearsal_text

PROCESS_BYTES = GIB  # of a rank's process here


@dataclass(frozen=True)
class RehearsalRequest:
    """The options of the command."""

    config_file: Path
    overrides: tuple[str, ...]
    gpu: GpuModel
    ranks: tuple[int, ...]
    all_stages: bool


def rehearse(request: RehearsalRequest) -> Rehearsed:
    """Rehearse the ranks that are asked for, or those that stand for all. UserError for ranks that there are not."""
    config = load_config(request.config_file, request.overrides)
    ranks = request.ranks or tuple(distinct_ranks(config, request.all_stages))
    wrong = [rank for rank in ranks if not 0 <= rank < config.world_size]
    if wrong:
        raise UserError(f"--ranks {wrong[0]}: the layout has ranks 0 to {config.world_size - 1}")
    at_once = max(1, min(len(ranks), usable_cores(), psutil.virtual_memory().available // PROCESS_BYTES))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool, ending_children():
        gpu_file(Path(folder)).write_bytes(orjson.dumps(request.gpu))
        records = list(pool.map(partial(in_own_process, request, config, Path(folder)), ranks))
    job = training_job(config, config.dpo, layout_of(config), request.gpu, Lengths())
    return Rehearsed(
        config, request.gpu if config.trainer.device != "cpu" else None, records, planned_memory(config, job)
    )


def in_own_process(request: RehearsalRequest, config: Config, folder: Path, rank: int) -> RankRecord:
    """Rehearse a rank in a process of its own. Its record has the end of its output where it crashed."""
    out = folder / f"{rank}.json"
    arguments = ["rehearse-rank", str(request.config_file), str(rank), str(out), str(gpu_file(folder))]
    done = subprocess.run(
        [*srlm_command(), *arguments, *request.overrides],
        env=environment(os.environ, threads=1, cpu=True, one_node=True),
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        preexec_fn=partial(die_with, os.getpid()),
    )
    if out.is_file():
        return parse_line(RankRecord, out.read_bytes())
    before_exit = done.stderr.partition("\nnanobind: ")[0]  # which counts what is left when Triton's process ends
    ending = "\n".join(before_exit.strip().splitlines()[-12:])
    return RankRecord.failed(rank, place_of(config, rank), ending or f"exit code {done.returncode}", 0.0)


def gpu_file(folder: Path) -> Path:
    """Return the file by which the ranks' processes are told the GPU."""
    return folder / "gpu.json"


def write_rank(config_file: Path, overrides: Sequence[str], rank: int, gpu_described: Path, out: Path) -> None:
    """Rehearse one rank in this process, and write its record."""
    config, gpu = load_config(config_file, overrides), parse_line(GpuModel, gpu_described.read_bytes())
    if config.trainer.device != "cpu" and find_spec("transformer_engine") is not None:  # before Megatron is imported
        from srlm_mega.tools.rehearsal.engine_stand_in import import_engine

        import_engine(gpu.capability)
    from srlm_mega.tools.rehearsal.rehearsed_rank import rehearse_rank

    gc.freeze()  # what was imported is not looked through again and again
    try:
        record = rehearse_rank(config, rank, gpu)
    except UserError as error:
        record = RankRecord.failed(rank, place_of(config, rank), str(error), 0.0)
    out.write_bytes(orjson.dumps(record))


def run(request: RehearsalRequest, as_json: bool) -> int:
    """Rehearse, and print text or JSON; return the exit code: 2 where a rank fails, does not fit or is
    tight."""
    rehearsed = rehearse(request)
    print(json.dumps(rehearsal_json(rehearsed), indent=1) if as_json else rehearsal_text(rehearsed))
    return 0 if rehearsed.succeeds else USER_ERROR
