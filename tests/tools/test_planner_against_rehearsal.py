"""The planner's memory against a rehearsal: the trainer's own code with tensors that have no contents.

Stages of one or two layers show more of an error than the presets' own: state is a smaller part of their memory.
"""

import os
import subprocess
from pathlib import Path

import orjson
import pytest
from engine_packages import engine_packages
from places import ROOT

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.gpus import find_gpu
from srlm_mega.records import parse_line
from srlm_mega.tools.planner.training_steps import Lengths, layout_of, planned_memory, training_job
from srlm_mega.tools.rehearsal.rehearsal_record import RankRecord
from srlm_mega.tools.rehearsal.rehearsed_rank import rehearse_rank

H100 = find_gpu("h100")
LARGE, SMALL = "llama2_70b_64gpu.yaml", "llama2_7b_8gpu.yaml"
FOUR, TWO, EIGHT = (f"model.num_layers={number}" for number in (4, 2, 8))
WHOLE_ROWS = "parallel.sequence_parallel=false"
# Layouts that show more than the presets' own: four stages of two replicas, and two replicas of four tensor ranks.
STAGES = ("parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=null",
          "parallel.data_parallel_size=2", FOUR)  # fmt: skip
TENSOR = ("parallel.tensor_model_parallel_size=4", "parallel.data_parallel_size=2", TWO)
ALONE = ("parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=8", TWO, WHOLE_ROWS)
INTERLEAVED = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
               "parallel.virtual_pipeline_model_parallel_size=2", "parallel.data_parallel_size=2", EIGHT)  # fmt: skip
PADDED = (*TENSOR, "dpo.packed_sequence_size=null", "sft.packed_sequence_size=null")
CONTEXT = (*PADDED, "parallel.context_parallel_size=2", "parallel.data_parallel_size=1")
# Of four pairs that a pack would hold each has its own, with a pipeline to fill.
PACKS = (*INTERLEAVED, "dpo.packs=auto", "dpo.packed_sequence_size=32768")
CASES = {  # what it shows: preset, rank, overrides
    "full recompute": (LARGE, 0, (*STAGES, "trainer.recompute_granularity=full")),
    "selective recompute": (SMALL, 0, (*TENSOR, "trainer.recompute_granularity=selective")),
    "one tensor rank": (SMALL, 0, ALONE),
    "padded rows": (SMALL, 0, (*PADDED, "dpo.micro_batch_size=2")),
}
PRESETS = {
    "7B": (SMALL, 0, ()),
    "70B, first stage": (LARGE, 0, ()),
    "70B, last stage": (LARGE, 63, ()),
}
MORE_CASES = {
    "first stage": (LARGE, 0, STAGES),
    "second stage": (LARGE, 16, STAGES),
    "last stage": (LARGE, 63, STAGES),
    "rows not split": (SMALL, 0, (*TENSOR, WHOLE_ROWS)),
    "no dropout": (SMALL, 0, (*TENSOR, "dpo.hidden_dropout=0", "sft.hidden_dropout=0")),
    "large vocabulary": (SMALL, 0, (*TENSOR, "model.vocab_size=128256", "model.num_query_groups=8")),
    "SFT needs more": (SMALL, 0, (*TENSOR, "sft.packed_sequence_size=16384")),
    "interleaved, first stage": (SMALL, 0, INTERLEAVED),
    "interleaved, last stage": (SMALL, 7, INTERLEAVED),
    "as many packs as fill the pipeline": (SMALL, 0, PACKS),
    "an empty pipeline": (LARGE, 0, (*STAGES, "dpo.global_batch_size=2")),
    "context parallelism": (SMALL, 0, CONTEXT),
    "70B, second stage": (LARGE, 8, ()),
}
EVERY_TOKEN_COUNTS = "candidates.max_new_tokens=4095"  # as the plan assumes of packs: short prompts, long responses


def settings(preset: str, *overrides: str) -> tuple[Path, tuple[str, ...]]:
    """The arguments of load_config."""
    return ROOT / "launch/configs" / preset, ("model.path=null", EVERY_TOKEN_COUNTS, *overrides)


def check(config: Config, record: RankRecord) -> None:
    """Planned without the margin, and the most bytes of tensors in a step."""
    job = training_job(config, config.dpo, layout_of(config), H100, Lengths())
    stage = planned_memory(config, job)[record.place.pp]
    peak = max(phase.peak_bytes for phase in record.phases if phase.name.endswith("step"))
    assert stage.parameters == record.parameters
    assert 1.0 <= stage.needed / peak <= 1.05, f"planned {stage}, rehearsed {record.holders[:12]}"


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *(pytest.param(case, marks=pytest.mark.extra) for case in (*PRESETS, *MORE_CASES)),
    ],
)
def test_planned_is_never_below_rehearsed_nor_5_percent_above(case: str) -> None:
    preset, rank, overrides = (CASES | PRESETS | MORE_CASES)[case]
    config = load_config(*settings(preset, *overrides))
    check(config, rehearse_rank(config, rank, H100))


@pytest.mark.extra
@pytest.mark.parametrize(("preset", "layers"), [(SMALL, TENSOR), (LARGE, STAGES)])
def test_transformer_engines_layers_are_planned_as_they_are(
    preset: str, layers: tuple[str, ...], tmp_path: Path, srlm: Path
) -> None:
    """By its own Python, in a process that finds it."""
    file, given = settings(preset, *layers, "model.layer_backend=transformer_engine")
    environment = os.environ | {"PYTHONPATH": str(engine_packages("2.11.0")), "OMP_NUM_THREADS": "1"}
    (tmp_path / "gpu.json").write_bytes(orjson.dumps(H100))
    argv = [srlm, "rehearse-rank", file, "0", tmp_path / "0.json", tmp_path / "gpu.json", *given]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = parse_line(RankRecord, (tmp_path / "0.json").read_bytes())
    assert record.backend.startswith("layers: transformer_engine")
    check(load_config(file, given), record)
