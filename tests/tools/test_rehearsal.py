"""The rehearsal: what stands in for CUDA keeps what the real operation keeps, refusals, host reads, and the tables."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu
from rehearsal_cases import ONE_STAGE, SMALL, TOY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from srlm_mega.config import Config
from srlm_mega.config.file import find_file, load_config
from srlm_mega.errors import UserError
from srlm_mega.gpus import find_gpu
from srlm_mega.tools.rehearsal import cuda_road, rehearse_command
from srlm_mega.tools.rehearsal.fake_tensors import fake_process_group
from srlm_mega.tools.rehearsal.rank_places import distinct_ranks, place_of
from srlm_mega.tools.rehearsal.rehearsal_record import HeldBytes, LayoutPlace, RankRecord
from srlm_mega.tools.rehearsal.rehearsal_table import rehearsal_json, rehearsal_text, verdict
from srlm_mega.tools.rehearsal.rehearse_command import RehearsalRequest
from srlm_mega.tools.rehearsal.rehearsed_rank import rehearse_rank
from srlm_mega.tools.rehearsal.watch import StepWatch
from srlm_mega.training.model import check_memory
from srlm_mega.training.topology import Topology

H100 = find_gpu("h100")
ON_GPUS = ("trainer.device=cuda", "trainer.bf16=true", "launch.processes_per_node=2")


def saved_bytes(operation: Callable[..., Tensor], *arguments: Any) -> int:
    """The bytes of the storages that autograd keeps for an operation's backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = operation(*arguments)
    assert result.requires_grad
    return sum(kept.values())


def tensor(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_keeps_what_the_real_one_keeps(groups: int) -> None:
    """Query, key, value, result, and a number per query and head, as FlashAttention on a CPU does; CUDA's also keeps
    its random state: two numbers of 8 bytes, and an unused one."""
    real = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    shapes = (2, 4, 32, 16), (2, groups, 32, 16), (2, groups, 32, 16)
    due = saved_bytes(real, *(tensor(*shape) for shape in shapes))
    with FakeTensorMode():
        stand_in = partial(cuda_road.attention, is_causal=True, enable_gqa=True, dropout_p=0.1)
        assert saved_bytes(stand_in, *(tensor(*shape) for shape in shapes)) == due + 24


def test_norms_keep_what_the_real_one_keeps() -> None:
    """Torch's own on a CPU: its input and a number per row. CUDA's kernel saves the same two (derivatives.yaml)."""
    due = saved_bytes(lambda hidden: F.rms_norm(hidden, (64,), eps=1e-5), tensor(8, 2, 64))
    assert due == 4 * (8 * 2 * 64 + 8 * 2)
    assert saved_bytes(lambda hidden: cuda_road.rms_norm(hidden, (64,), eps=1e-5), tensor(8, 2, 64)) == due


def test_dropout_and_its_residual_keep_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own function over the operation that dropout is on CUDA, which runs on a CPU too."""
    fused = partial(cuda_road.dropout_add, probability=0.1)
    kept = saved_bytes(lambda hidden, residual: fused((hidden, None), residual), tensor(8, 64), tensor(8, 64))
    monkeypatch.setattr(F, "dropout", cuda_road.dropout)
    real = partial(fused_bias_dropout._bias_dropout_add_func, prob=0.1, training=True)
    due = saved_bytes(lambda hidden, residual: real((hidden, None), residual), tensor(8, 64), tensor(8, 64))
    assert kept == due == 8 * 64
    without = partial(cuda_road.dropout_add, probability=0.0)
    assert saved_bytes(lambda hidden, residual: without((hidden, None), residual), tensor(8, 64), tensor(8, 64)) == 0


def test_swiglu_keeps_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's autograd function, with its two products and with their stand-ins."""
    apply = partial(fused_bias_swiglu.SwiGLUFunction.apply)
    monkeypatch.setattr(fused_bias_swiglu, "swiglu", lambda y: F.silu(y[..., :32]) * y[..., 32:])
    due = saved_bytes(lambda hidden: apply(hidden, False, False), tensor(8, 64))
    real = apply(tensor(8, 64), False, False)
    monkeypatch.setattr(fused_bias_swiglu, "swiglu", cuda_road.swiglu)
    assert saved_bytes(lambda hidden: apply(hidden, False, False), tensor(8, 64)) == due == 4 * 8 * 64
    assert apply(tensor(8, 64), False, False).shape == real.shape
    assert cuda_road.swiglu_back(real, tensor(8, 64)).shape == (8, 64)


@pytest.fixture(scope="module")
def on_gpus() -> RankRecord:
    """The second of two tensor-parallel ranks on GPUs, with dropout and an odd vocabulary."""
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "dpo.hidden_dropout=0.1")
    return rehearse_rank(load_config(TOY, [*SMALL, ONE_STAGE, *ON_GPUS, *layout]), 1, H100)


def test_no_host_read_inside_layers(on_gpus: RankRecord) -> None:
    """In a step the host waits for the losses' sums and for the gradients' norm, and for nothing else."""
    steps = {"reference", "SFT step", "DPO step"}
    reads = [(read.phase, read.where.partition(":")[0], read.count) for read in on_gpus.host_reads]
    norm, sums = "megatron/core/optimizer/clip_grads.py", "training/topology.py"
    assert sorted(read for read in reads if read[0] in steps) == [
        (phase, file, 1) for phase in ("DPO step", "SFT step") for file in (norm, sums)
    ]


def test_the_head_keeps_exponentials_in_16_bits(on_gpus: RankRecord) -> None:
    """65 of 131 tokens are this rank's; a pack has two pairs of 127 inputs each, of which 24 each are responses'."""
    held = sum(held.bytes for held in on_gpus.holders if held.kind == "head" and "logprob.py" in held.where)
    assert on_gpus.positions == 512
    assert held >= 4 * 24 * 65 * 2


def test_memory_is_refused_in_the_words_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 2 70B in one stage with the whole optimizer: the trainer's own check, on a GPU with as much memory."""
    overrides = [
        "parallel.pipeline_model_parallel_size=1",
        "parallel.virtual_pipeline_model_parallel_size=null",
        "parallel.data_parallel_size=8",
        "parallel.use_distributed_optimizer=false",
        "parallel.overlap_param_gather=false",
    ]
    config = load_config(find_file(Path("llama2_70b_64gpu")), overrides)
    with pytest.raises(UserError) as rehearsed:
        rehearse_rank(config, 9, H100)
    properties = type("Properties", (), {"total_memory": int(H100.memory_bytes)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    trainer = config.trainer.model_copy(update={"device": "cpu"})
    with fake_process_group(9, 64), Topology.start(config.parallel, trainer, 0) as topology:
        in_the_job = replace(topology, device=torch.device("cuda", 1))
        with pytest.raises(UserError) as refused:
            check_memory(config.model.shape, config, in_the_job)
    assert str(rehearsed.value) == str(refused.value)
    assert "GiB that cuda:1 has" in str(refused.value)


def test_a_model_that_cannot_be_split_is_refused_in_the_words_of_the_job() -> None:
    config = load_config(TOY, [*SMALL, *ON_GPUS, ONE_STAGE, "parallel.tensor_model_parallel_size=2"])
    config = config.model_copy(update={"model": config.model.model_copy(update={"ffn_hidden_size": 257})})
    with pytest.raises(UserError, match=r"257 rows of ffn_hidden_size .* TP 2.*choose another parallel layout"):
        rehearse_rank(config, 0, H100)


def test_ranks_that_differ() -> None:
    """Llama 2 70B: ranks are numbered TP, CP, DP, PP from the inside out, so a stage has 8."""
    config = load_config(find_file(Path("llama2_70b_64gpu")), [])
    assert distinct_ranks(config, all_stages=False) == [0, 8, 56]
    assert distinct_ranks(config, all_stages=True) == [0, 8, 16, 24, 32, 40, 48, 56]
    assert place_of(config, 63) == LayoutPlace(tp=7, pp=7, dp=0, cp=0)
    odd = load_config(find_file(Path("llama2_70b_64gpu")), ["model.vocab_size=32001"])
    assert distinct_ranks(odd, all_stages=False) == [0, 8, 56, 63]


def test_an_interleaved_pipeline_of_four_stages() -> None:
    """Its schedule takes no fewer micro batches than stages, in the reference pass too."""
    layout = ("model.num_layers=8", "parallel.pipeline_model_parallel_size=4", "launch.processes_per_node=4",
              "parallel.virtual_pipeline_model_parallel_size=2", "dpo.packs=auto", "dpo.global_batch_size=4",
              "sft.global_batch_size=4")  # fmt: skip
    found = rehearse_rank(load_config(TOY, [*SMALL, *layout]), 0, H100)
    assert found.micro_batches % 4 == 0
    assert [phase.name for phase in found.phases][:2] == ["build", "reference"]


def record(rank: int, peak: int, error: str | None = None) -> RankRecord:
    """A rank that was rehearsed, without the trainer."""
    made = RankRecord.failed(rank, LayoutPlace(0, 0, 0, 0), error or "", 1.0)
    return replace(made, error=error, peak_bytes=peak, holders=(HeldBytes("activations", "a.py:1", peak),))


def rehearsed(monkeypatch: pytest.MonkeyPatch, *records: RankRecord) -> Any:
    """The command's result where its processes find these records."""

    def found(request: RehearsalRequest, config: Config, folder: Path, rank: int) -> RankRecord:
        return records[rank]

    monkeypatch.setattr(rehearse_command, "in_own_process", found)
    request = RehearsalRequest(TOY, ("trainer.device=cuda",), H100, tuple(range(len(records))), False)
    return rehearse_command.rehearse(request)


def test_whether_it_fits_is_said_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 GiB + 5 % + 3 are below an H100's 79.6 GiB, 74 GiB + 5 % + 3 above, as 80 GiB are alone."""
    result = rehearsed(monkeypatch, record(0, 60 * 2**30), record(1, 74 * 2**30))
    assert verdict(result, result.records[0]).startswith("fits: 60.00 GiB of tensors + 3.00 of the allocator")
    assert verdict(result, result.records[1]).startswith("TIGHT, it fits only without the margin: 74.00 GiB")
    none = rehearsed(monkeypatch, record(0, 80 * 2**30))
    assert verdict(none, none.records[0]).startswith("DOES NOT FIT: 80.00 GiB")
    answers = [rank["fits"] for one in (result, none) for rank in rehearsal_json(one)["ranks"]]
    assert answers == ["fits", "tight", "does not fit"]
    assert not rehearsed(monkeypatch, record(0, 74 * 2**30)).succeeds
    assert verdict(result, result.records[1]).endswith("= 80.70 of the 79.6 GiB of h100")
    assert not result.succeeds
    assert rehearsed(monkeypatch, record(0, 60 * 2**30)).succeeds


def test_a_rank_that_fails_ends_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = rehearsed(monkeypatch, record(0, 0, "no such layout"))
    monkeypatch.setattr(rehearse_command, "rehearse", lambda request: result)
    request = RehearsalRequest(TOY, (), H100, (), False)
    assert rehearse_command.run(request, as_json=False) == 2
    assert "rank 0 (stage 0): FAILS: no such layout" in capsys.readouterr().out
    assert rehearse_command.run(request, as_json=True) == 2
    assert json.loads(capsys.readouterr().out)["succeeds"] is False


def test_ranks_outside_of_the_layout_are_refused() -> None:
    with pytest.raises(UserError, match="--ranks 2: the layout has ranks 0 to 1"):
        rehearse_command.rehearse(RehearsalRequest(TOY, (), H100, (0, 2), False))


def test_a_watch_counts_what_is_alive() -> None:
    """Two tensors of 4000 bytes at once, the first of them freed before a third one is made."""
    with StepWatch(lambda group: "") as watch, watch.phase("a step"):
        first, second = torch.ones(1000), torch.ones(1000)
        assert watch.alive("activations") == 8000
        del first
        third = second * 2
        bool(third[0] == 2)
    assert (watch.peak, watch.phases()[0].peak_bytes) == (8000 + 1, 8000 + 1)
    assert [(read.phase, read.count) for read in watch.host_reads()] == [("a step", 1)]


def test_a_watch_knows_which_operations_wait_for_values() -> None:
    """Picking by a mask and asking for a number do; filling by a mask and picking by numbers do not."""
    with StepWatch(lambda group: "") as watch, watch.phase("a step"):
        values = torch.arange(6)
        values[values > 3] = 0
        values[torch.tensor([1, 2])].sum()
        assert not watch.host_reads()
        values[values > 0].sum().item()
    assert sum(read.count for read in watch.host_reads()) == 2


@pytest.mark.slow
def test_the_command_rehearses_in_a_process_of_its_own() -> None:
    """Two layers of Llama 2 7B on eight GPUs. Whole presets: test_planner_against_rehearsal.py."""
    request = RehearsalRequest(Path("llama2_7b_8gpu"), ("model.num_layers=2",), H100, (), False)
    result = rehearse_command.rehearse(request)
    (found,) = result.records
    assert found.error is None
    assert result.succeeds
    assert {phase.name for phase in found.phases} >= {"reference", "SFT step", "DPO step", "checkpoint"}
    assert found.state_bytes < found.peak_bytes
    assert found.resident_bytes < 2**30
    assert "Messages of a DPO step of rank 0 (4 micro batches)" in rehearsal_text(result)
