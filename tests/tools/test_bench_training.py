"""`srlm bench training`: the stopwatch by hand, and the command as users start it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import distributed as dist

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.random_weights import LazyRandomWeights
from srlm_mega.config.file import load_config
from srlm_mega.config.training import DpoConfig
from srlm_mega.tools.bench_record import BenchRecord, read_record
from srlm_mega.tools.bench_training import TrainingRequest, check_baseline, random_pairs, uniform_reference
from srlm_mega.tools.plain_dpo import PlainDpo
from srlm_mega.tools.time_split import TimeSplit, communicating_modules

SHAPE = LlamaShape(2, 16, 24, 4, 2, 32, 64, 1e-5, 1e4)
CPU = torch.device("cpu")
SMALL = ("--steps", "2", "--warmup", "1", "dpo.global_batch_size=4", "dpo.micro_batch_size=2", "model.seq_length=32",
         "candidates.max_new_tokens=8", "judge.max_new_tokens=8", "prompts.max_new_tokens=8")  # fmt: skip

ONE = ("parallel.pipeline_model_parallel_size=1", "launch.processes_per_node=1")


def test_a_part_inside_another_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward from 1 to 9 with communication from 3 to 8; the rest of the 10 seconds is other's."""
    times = iter([0.0, 1.0, 3.0, 8.0, 9.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    split = TimeSplit(CPU)
    split.start()
    with split.part("forward"), split.part("communication"):
        pass
    assert split.stop() == {
        "data": 0, "forward": 3.0, "backward": 0, "optimizer": 0, "communication": 5.0, "other": 2.0
    }  # fmt: skip


def test_collectives_are_found_under_all_their_names() -> None:
    """Megatron keeps some as module variables of its own, made when it is imported."""
    import megatron.core.tensor_parallel.mappings as mappings

    modules = communicating_modules()
    assert dist in modules and mappings in modules
    assert mappings.dist_all_gather_func is dist.all_gather_into_tensor


def test_random_pairs_fit_and_are_the_same_everywhere() -> None:
    pairs = random_pairs(200, 64, 32)
    assert pairs == random_pairs(200, 64, 32)
    lengths = [len(sequence.tokens) for pair in pairs for sequence in pair.sequences]
    assert min(lengths) >= 16 and 56 < max(lengths) <= 64
    assert all(pair.chosen.tokens[: pair.chosen.num_prompt] == pair.rejected.tokens[: pair.rejected.num_prompt]
               for pair in pairs)  # fmt: skip


def plain_loss(size: int, beta: float = 0.1) -> float:
    """The loss after one step of the plain twin."""
    section = DpoConfig(train_iters=1, lr=1e-2, min_lr=0, beta=beta)
    plain = PlainDpo.build(SHAPE, LazyRandomWeights(SHAPE, 0.3, 0, CPU), section, CPU, bf16=False)
    pairs = random_pairs(4, 64, 32)
    reference = [uniform_reference(pair, 32) for pair in pairs]
    plain.step(pairs, reference, lr=1e-2, size=size)
    return plain.step(pairs, reference, lr=1e-2, size=size)


def test_the_baseline_does_not_depend_on_its_micro_batches() -> None:
    """Padding and masks are right: pairs of any lengths side by side give the same update."""
    assert plain_loss(4) == pytest.approx(plain_loss(1), rel=1e-5)
    assert plain_loss(4) != pytest.approx(plain_loss(4, beta=0.101), rel=1e-4)


def bench(srlm: Path, out: Path, *overrides: str) -> BenchRecord:
    """The record of a small measurement."""
    argv = [srlm, "bench", "training", ROOT / "launch/configs/toy_cpu.yaml", "--json", out, *SMALL, *overrides]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--sweep" not in overrides:
        assert "tokens/s/GPU" in done.stdout and "no MFU" in done.stdout
    return read_record(out)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), ("model.tie_word_embeddings=true", "model.rope_scaling={factor: 32}")])
def test_one_process_beside_the_baseline(srlm: Path, tmp_path: Path, shape: tuple[str, ...]) -> None:
    """Both do the same computation: their losses agree after every step."""
    record = bench(srlm, tmp_path / "result.json", "--baseline", *ONE, *shape)
    difference, ratio = record.row("difference of losses"), record.row("plain / ours")
    assert max(difference.samples) < 1e-4 < (difference.extra["tolerance"] or 0)
    ours, plain = record.row("step").samples, record.row("plain step").samples
    assert len(ours) == len(plain) == 2
    assert ratio.samples == pytest.approx([two / one for one, two in zip(ours, plain, strict=True)])
    assert (record.bench, record.devices, record.settings["objective"]) == ("training", 1, "dpo")
    assert "--json" not in record.command and record.command[:3] == ("srlm", "bench", "training")


@pytest.mark.slow
@pytest.mark.extra
def test_pipeline_stages_report_their_memory(srlm: Path, tmp_path: Path) -> None:
    record = bench(srlm, tmp_path / "result.json")
    assert record.devices == 2 and all("plain" not in row.name for row in record.rows)
    memory = {row.name: row.samples for row in record.rows if row.unit == "GiB"}
    assert memory.keys() == {"memory/stage_0_peak_rss_GiB", "memory/stage_1_peak_rss_GiB"}
    assert all(0.1 < peak < 4 for (peak,) in memory.values())
    for part in ("data", "forward", "backward", "optimizer", "communication"):
        assert record.row(f"part {part}").samples[0] > 0


@pytest.mark.extra
def test_a_sweep_measures_every_value_it_can(srlm: Path, tmp_path: Path) -> None:
    """None at once is refused, with exit code 2; the others are measured."""
    out = tmp_path / "sweep.json"
    swept = bench(srlm, out, "--sweep", "dpo.micro_batch_size=1,0,2", *ONE)
    assert swept.settings["sweep"] == {"key": "dpo.micro_batch_size", "values": ["1", "2"], "failed": {"0": 2}}
    assert all(len(swept.row(f"step at dpo.micro_batch_size={value}").samples) == 2 for value in (1, 2))
    image = tmp_path / "sweep.svg"
    plot = [sys.executable, ROOT / "tools/scripts/plot_bench.py", out, image]
    plotted = subprocess.run(plot, capture_output=True, text=True, timeout=200)
    assert plotted.returncode == 0 and "<svg" in image.read_text(encoding="utf-8")


def test_a_baseline_that_does_something_else_is_refused() -> None:
    path, request = ROOT / "launch/configs/toy_cpu.yaml", TrainingRequest("dpo", 1, 1, True, None, None)
    check_baseline(load_config(path), request)
    with pytest.raises(ValueError, match="no hidden dropout"):
        check_baseline(load_config(path, ["dpo.hidden_dropout=0.1"]), request)
    with pytest.raises(ValueError, match="plain DPO"):
        check_baseline(load_config(path, ["dpo.rpo_alpha=0.1"]), request)
