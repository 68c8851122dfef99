"""Where a packed step makes the host wait for a GPU: counted on a CPU, which takes the same road in the layers."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from places import TOY
from torch.utils._python_dispatch import TorchDispatchMode

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.training import ParallelConfig
from srlm_mega.kernels import checks
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.dpo import DpoObjective
from srlm_mega.training.model import build_model, transformer_config
from srlm_mega.training.schedule import forward_backward
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.trainer import Trainer

SHAPE = LlamaShape(2, 32, 48, 4, 2, 64, 64, 1e-5, 10000.0, False)
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "repeat_interleave")  # of a GPU's values
COPIES = ("lift_fresh",)  # torch.tensor: a copy from the host's memory, for which PyTorch waits too
# Megatron 0.16 reads the number by which it divides the gradients; a 0 of each micro batch that stays on the CPU is no
# copy.
ONCE = {"finalize_model_grads": 1}


class HostReads(TorchDispatchMode):
    """Counts the functions of ours and of Megatron's in which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(READS + COPIES) or by_mask(name, args):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        """Count the innermost function that is neither PyTorch's nor the counter's."""
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_qualname.startswith(("HostReads.", "reads.")):
            assert frame.f_back is not None
            frame = frame.f_back
        self.places[frame.f_code.co_qualname] += 1


def by_mask(name: str, args: Any) -> bool:
    """Whether an indexing looks for the places of a mask."""
    return name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """The counter, also of `tolist`, which no dispatch sees; the kernels' checks of values read on a CPU only."""
    counter, tolist = HostReads(), torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        counter.note()
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for check in ("check_targets", "check_rows", "check_segments", "check_pairs", "check_shares"):
        monkeypatch.setattr(checks, check, lambda *values: None)
    yield counter


def settings(*overrides: str) -> Config:
    return load_config(TOY, ["dpo.attention_dropout=0.1", "dpo.hidden_dropout=0.1", *overrides])


def test_reads_are_seen(reads: HostReads) -> None:
    """Negative control."""
    tensor = torch.arange(3)

    def wait() -> None:
        tensor.tolist()
        if tensor[0] == 0:
            tensor[tensor > 1]
        torch.tensor(1.0)

    with reads:
        wait()
    assert reads.places == {wait.__qualname__: 4}


@pytest.mark.parametrize("recompute", ["null", "selective", "full"])
def test_no_layer_and_no_loss_waits(recompute: str, reads: HostReads) -> None:
    """Every micro batch of a DPO and of an SFT step, forward and backward, with dropout."""
    config = settings(f"trainer.recompute_granularity={recompute}")
    sequences = [TokenSequence(f"s{n}", tuple(range(1, 4 + n)), 2) for n in range(8)]
    pairs = [PairSequences(f"p{n}", *sequences[2 * n : 2 * n + 2]) for n in range(4)]
    with process_group(config.trainer), Topology.start(ParallelConfig(), config.trainer, seed=0) as topology:
        model_config = transformer_config(SHAPE, config.dpo, config, topology)
        chunks = build_model(model_config, SHAPE, topology)
        trainer = Trainer.around(chunks, model_config, topology, config, config.dpo, SHAPE, 1)
        reference = [ReferenceLogprobs(pair.id, -9.0, -9.0) for pair in pairs]
        section = config.dpo.model_copy(update={"packed_sequence_size": 24})
        objectives = (
            DpoObjective(pairs, reference, section, topology, SHAPE.vocab_size, None),
            SftObjective(sequences, section, topology, SHAPE.vocab_size),
        )
        for objective in objectives:
            step = objective.prepare(range(len(objective.items)))
            assert len(step.micro_batches) > 1
            reads.places.clear()
            with reads:
                forward_backward(trainer.model, step, objective.num_sums, topology)
            assert reads.places <= Counter(ONCE | {"forward_step_calc_loss": len(step.micro_batches)})
