"""The planner's memory: a model worked out by hand, the trainer's own refusal, and the trainer measured."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.placement import placements
from srlm_mega.config.file import load_config
from srlm_mega.config.model_sizes import GIB, ModelSizes
from srlm_mega.gpus import find_gpu
from srlm_mega.tools.planner.job import Job, ParallelLayout
from srlm_mega.tools.planner.memory import (
    LIBRARY_BYTES,
    MARGIN,
    Fit,
    fit,
    head_bytes,
    layer_bytes,
    layer_temporaries,
    layers_in_flight,
    parameters_of,
    pipeline_bytes,
    stage_memory,
)
from srlm_mega.tools.planner.shapes import PUBLISHED
from srlm_mega.tools.planner.training_steps import Lengths, layout_of, longest_job, training_job
from srlm_mega.training.memory_budget import MemoryBudget, num_parameters

H100 = find_gpu("h100")
TINY = ModelSizes(num_layers=2, hidden=8, ffn=16, heads=2, groups=1, vocab=32)
TOY = "launch/configs/toy_cpu.yaml"
ONE_PROCESS = ("parallel.pipeline_model_parallel_size=1", "launch.processes_per_node=1")


def tiny_job(**change: object) -> Job:
    job = Job(TINY, H100, ParallelLayout(sequence_parallel=False), "fp32", 1, 1, 10)
    return replace(job, **change)  # type: ignore[arg-type]


def test_two_layers_by_hand() -> None:
    """Hidden 8, two heads of 4, one group: keys and values 4 each. A layer: qkv 8 * 16, out 8 * 8, MLP 3 * 8 * 16: 576,
    and two norms of 8: 592. Two of them, embedding and output 32 * 8 each, the last norm 8: 1704 parameters.
    fp32: 4 + 4 + 8 bytes each. What a token of a layer of Transformer Engine keeps, in numbers of 4 bytes: 2 * (8 + 8
    + 1) (norms: input, result, statistic), 16 (qkv) + 8 + 4 (rotated query and key) + 8 (attention's result) + 2
    (statistics), 2 * 16 + 16 (MLP): 120, 480 bytes. The last norm 17 numbers, ids 32 bytes.
    Backward in the MLP: gradients of hidden states twice and of SwiGLU's result: 8 + 8 + 16, and a place for a layer's
    576 weights. Whole logits are more: 32 * (4 + 4 + 8) bytes a token, next to the same place."""
    (stage,) = stage_memory(tiny_job())
    assert stage.parameters == 1704
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * 1704, 4 * 1704, 8 * 1704)
    assert stage.activations == 10 * (2 * 480 + 4 * 17 + 32)
    assert layer_temporaries(tiny_job()) == 10 * 4 * (8 + 8 + 16) + 4 * 576
    assert (stage.temporaries, stage.head) == (0, 10 * 32 * 16 + 4 * 576)
    assert stage.communication == stage.cp_buffers == stage.pp_buffers == 0
    assert stage.needed == 16 * 1704 + 10 * (2 * 480 + 4 * 17 + 32) + 10 * 32 * 16 + 4 * 576
    assert stage.total == pytest.approx(stage.needed * (1 + MARGIN))


def test_other_modes_by_hand() -> None:
    """bf16: 2 + 4 + 12 bytes a parameter, 2 bytes a number. Full recompute keeps the layer's input, and one layer with
    its output while it is done again. TP 2 with sequence parallelism halves all matrices, not the norms."""
    (half,) = stage_memory(tiny_job(precision="bf16"))
    assert (half.weights, half.gradients, half.optimizer) == (2 * 1704, 4 * 1704, 12 * 1704)
    assert half.margin == pytest.approx(MARGIN * half.needed + LIBRARY_BYTES)
    full = tiny_job(recompute="full")
    assert stage_memory(full)[0].activations == 10 * (2 * 8 * 4 + 4 * 17 + 32)
    assert layer_temporaries(full) == layer_temporaries(tiny_job()) + 10 * (480 + 8 * 4)
    (selective,) = stage_memory(tiny_job(recompute="selective"))
    assert selective == stage_memory(tiny_job())[0], "Transformer Engine's norms have nothing for it to save"
    (shared,) = stage_memory(tiny_job(layout=ParallelLayout(tp=2)))
    assert shared.parameters == (1704 - 40) / 2 + 40
    (fp8,) = stage_memory(tiny_job(precision="fp8"))
    assert fp8.weights == 4 * 1704  # bf16, and two FP8 copies
    (alone,) = stage_memory(tiny_job(precision="fp8", fp8_weights=True))
    assert alone.weights == 2 * 1704


def test_kinds_of_layers_by_hand() -> None:
    """bf16, numbers of 2 bytes, a token of the layer above. Transformer Engine: 2 * (8 + 8) + 16 + 8 + 4 + 8 + 32 + 16
    = 116, and 4 statistics in fp32: 248 bytes. Torch: two norms with an fp32 copy in place of the input, and the result
    before its weight: 2 * (2 + 2) * 8 bytes more; cosines and sines of 4 for queries and keys, 4 * 4 numbers; with
    dropout two masks of 8 bytes. Compiled: no joint qkv (16 numbers), but values (4). FP8: each product's input 1 byte
    in place of 2 (8, 8 and 16 numbers less half), and the result of attention once more in 1 byte."""
    bf16 = tiny_job(precision="bf16")
    assert layer_bytes(bf16) == 10 * 248
    torch_layers = replace(bf16, stack=replace(bf16.stack, layers="torch"))
    assert layer_bytes(torch_layers) == 10 * (248 + 2 * 4 * 8 + 16 * 2)
    assert layer_bytes(replace(torch_layers, recompute="selective")) == 10 * (248 + 16 * 2), "norms are made again"
    assert layer_bytes(replace(torch_layers, hidden_dropout=True)) == layer_bytes(torch_layers) + 10 * 2 * 8
    compiled = replace(bf16, stack=replace(bf16.stack, layers="compiled"))
    assert layer_bytes(compiled) == 10 * (248 - 2 * 16 + 2 * 4)
    assert layer_bytes(replace(bf16, precision="fp8")) == 10 * (248 - 8 - 8 - 16 + 8)


def test_our_head_by_hand() -> None:
    """fp32, half of 10 tokens count: exp(z - max) 5 * 32 numbers; 5 rows of 8 and their gradients; gradients of the
    hidden states, twice; a place for the matrix's gradient of 32 * 8. TP 2 gathers the other ranks' rows, and halves
    vocabulary and hidden states; with 40 tokens their gathered gradients are more than the place."""
    one = tiny_job(fused_head=True, head_rows=0.5)
    assert head_bytes(one) == 4 * (5 * 32 + 2 * 5 * 8 + 2 * 10 * 8 + 32 * 8)
    two = replace(one, layout=ParallelLayout(tp=2), seq_length=40)
    assert head_bytes(two) == 4 * (20 * 16 + 40 * 8 + 2 * 20 * 8 + 2 * 20 * 8 + 40 * 8)


def test_whole_logits_by_hand() -> None:
    """10 tokens, 32 words, bf16: logits and their gradient, 2 bytes each; without a fused loss twice 4 bytes more."""
    job = tiny_job(precision="bf16")
    assert head_bytes(job) == 10 * 32 * 12
    assert head_bytes(replace(job, stack=replace(job.stack, fused_loss=True))) == 10 * 32 * 4


def test_pipeline_buffers_by_hand() -> None:
    """Hidden states of 10 tokens: 320 bytes in fp32. Of three stages the first holds 3 outputs, the second 2 inputs and
    2 outputs, the last one input; two more are on their way."""
    deep = tiny_job(layout=ParallelLayout(pp=3, sequence_parallel=False), global_batch=3)
    assert [pipeline_bytes(deep, stage) for stage in range(3)] == [5 * 320, 6 * 320, 3 * 320]


def test_layers_in_flight_by_hand() -> None:
    """1F1B: the first of 4 stages holds 4 micro batches, the last one. Interleaved with 2 chunks: 2 * 3 + 4 + 1 = 11
    chunks of 10 layers on the first of 4 stages with 20 layers each; fewer micro batches bound it."""
    deep = Job(PUBLISHED["llama2-70b"], H100, ParallelLayout(tp=8, pp=4, vpp=1), "bf16", 1, 16, 4096)
    assert [layers_in_flight(deep, stage) for stage in range(4)] == [80, 60, 40, 20]
    interleaved = replace(deep, layout=replace(deep.layout, vpp=2))
    assert layers_in_flight(interleaved, 0) == 110
    assert layers_in_flight(replace(interleaved, global_batch=4), 0) == 80


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (8, 4, 2), (4, 2, 8), (2, 16, 1)])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["llama2-70b", "llama3-1b"])
def test_the_trainer_refuses_by_the_same_bytes(tp: int, pp: int, dp: int, bf16: bool, name: str) -> None:
    """Weights, gradients, optimizer of every stage equal training/memory_budget.py's. The second model is tied: one
    embedding, or with a pipeline a copy on the last stage."""
    shape = {
        "llama2-70b": LlamaShape(80, 8192, 28672, 64, 8, 32000, 4096, 1e-5, 10000.0),
        "llama3-1b": LlamaShape(16, 2048, 8192, 32, 8, 128256, 131072, 1e-5, 500000.0, tie_word_embeddings=True),
    }[name]
    job = Job(PUBLISHED[name], H100, ParallelLayout(tp, pp, 1, dp), "bf16" if bf16 else "fp32", 1, 8, 4096)
    for stage, part in zip(stage_memory(job), placements(shape, tp, pp)[::tp], strict=True):
        budget = MemoryBudget(num_parameters(shape, part), bf16, dp)
        assert stage.parameters == budget.parameters == parameters_of(job, stage.stage)
        assert (stage.weights, stage.gradients) == (budget.weights, budget.gradients)
        assert int(stage.optimizer) == budget.optimizer


def test_llama_2_70b_fits_where_it_should() -> None:
    job = Job(PUBLISHED["llama2-70b"], H100, ParallelLayout(tp=8, pp=4, dp=2), "bf16", 1, 16, 4096, fused_head=True)

    def answer(layout: ParallelLayout, gpu: str = "h100") -> Fit:
        return fit(stage_memory(replace(job, layout=layout)), find_gpu(gpu))

    assert answer(job.layout) == "fits"
    assert answer(ParallelLayout(tp=8, pp=1, dp=1)) == "does not fit"
    assert answer(ParallelLayout(tp=8, pp=2, dp=1)) == "does not fit"
    assert answer(ParallelLayout(tp=8, pp=2, dp=1), "b200") == "fits"


def test_a_tight_job_fits_only_without_the_margin() -> None:
    """The fullest of four stages decides: on a GPU with exactly its bytes and the margin, with a little less, with
    exactly its bytes, with a little less."""
    job = Job(PUBLISHED["llama2-70b"], H100, ParallelLayout(tp=8, pp=4, dp=2), "bf16", 1, 16, 4096)
    fullest = stage_memory(job)[0]
    assert fullest.needed == max(stage.needed for stage in stage_memory(job))
    answers = ((fullest.total, "fits", "tight"), (fullest.needed, "tight", "does not fit"))
    for size, enough, less in answers:
        for gib, answer in ((size / GIB, enough), (0.9999 * size / GIB, less)):
            assert fit(stage_memory(job), replace(H100, memory_gib=gib)) == answer
    (bare,) = {stage.allocator_share for stage in stage_memory(job, margin=0)}
    assert bare == 0 and stage_memory(job, margin=0)[0].total == fullest.needed + LIBRARY_BYTES
    wide = replace(H100, memory_gib=1.3 * fullest.needed / GIB)
    assert fit(stage_memory(job), wide) == "fits" and fit(stage_memory(job, margin=0.5), wide) == "tight"


@pytest.mark.extra
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.hidden_size=256", "model.ffn_hidden_size=768", "model.num_layers=4",
         "trainer.recompute_granularity=full"),
        ("model.hidden_size=256", "model.ffn_hidden_size=768", "dpo.packed_sequence_size=null",
         "dpo.micro_batch_size=8"),
    ],
)  # fmt: skip
def test_the_trainer_measured_on_a_cpu(overrides: tuple[str, ...]) -> None:
    """The most bytes that tensors took in two DPO steps, within 5 % of the plan without its margin."""
    held, peak = measured(overrides)
    config = load_config(Path(TOY), [*ONE_PROCESS, *overrides])
    job = longest_job(config, config.dpo, training_job(config, config.dpo, layout_of(config), H100, Lengths()))
    (stage,) = stage_memory(job)
    state = stage.weights + stage.gradients + stage.optimizer
    assert held == pytest.approx(state, rel=0.01)
    assert peak == pytest.approx(stage.needed, rel=0.05)
    assert peak > 1.4 * state, "activations must matter for this to prove anything"


def measured(overrides: tuple[str, ...]) -> tuple[int, int]:
    """Bytes held before the first step, and at most."""
    worker = Path(__file__).parent / "planner_memory_worker.py"
    argv = [sys.executable, str(worker), TOY, *ONE_PROCESS, *overrides]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    _, held, _, peak = done.stdout.splitlines()[-1].split()
    return int(held), int(peak)
