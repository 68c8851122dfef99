"""megatron-core on CPU and gloo: every shim, applied once by Topology when the device is the CPU.

megatron-core allocates on CUDA by name. Shims in three places make it run on a CPU: two functions of `torch.cuda` that
it asks for the device, the 'cuda' literals inside a short list of its functions, and the state of the CUDA random
generator. The shims go by name, so they are for the versions of `megatron_version` only, and a literal that is no
longer where it was is an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import unwrap
from types import CodeType
from typing import Any

import megatron.core
import torch
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from torch.distributed import ProcessGroup

from srlm_mega.training.context_parallel import cp_positions
from srlm_mega.training.megatron_version import VERSIONS, megatron_version

CUDA_TYPES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


@dataclass(frozen=True)
class Rebinding:
    """Literals to replace in one function: each key must be there and becomes its value."""

    function: Callable[..., Any]
    literals: dict[str, str]


REBINDINGS = (
    Rebinding(schedules.forward_backward_no_pipelining, {"cuda": "cpu"}),
    Rebinding(schedules.forward_backward_pipelining_with_interleaving, {"cuda": "cpu"}),
    Rebinding(schedules.forward_backward_pipelining_without_interleaving, {"cuda": "cpu"}),
    Rebinding(clip_grads.get_grad_norm_fp32, {"cuda": "cpu"}),
    Rebinding(optimizer.FP32Optimizer.__init__, {"cuda": "cpu"}),
    Rebinding(optimizer.MixedPrecisionOptimizer.__init__, {"cuda": "cpu"}),
    Rebinding(optimizer.Float16OptimizerWithFloat16Params.__init__, CUDA_TYPES),
    Rebinding(distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups, CUDA_TYPES),
    Rebinding(distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero, {"cuda": "cpu"}),
    # Tied embeddings with pipeline stages: `weight.data.cuda()` becomes `weight.data.cpu()`.
    Rebinding(LanguageModule.setup_embeddings_and_output_layer, {"cuda": "cpu"}),
)


class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
    """Megatron's named random states (one per tensor-parallel rank, ...), for the CPU's generator."""

    states_: dict[str, torch.Tensor]
    _current_state_name: str

    def add(self, name: str, seed: int) -> None:
        """Start the stream `name` from `seed`; the current state stays as it is."""
        if name in self.states_:
            raise ValueError(f"random stream {name} was added twice")
        self._is_initialized = True
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw random numbers from the stream `name` inside the block."""
        outer_state, outer_name = torch.get_rng_state(), self._current_state_name
        if outer_name != "default-rng":
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer_state if outer_name == "default-rng" else self.states_[outer_name])
            self._current_state_name = outer_name


@cache
def apply() -> None:
    """Make megatron-core run on the CPU, for the rest of this process."""
    version = megatron_version(megatron.core.__version__)
    for rebinding in REBINDINGS:
        rebind(rebinding)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    if version.waits_for_stream:
        torch.cuda.current_stream = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = _on_this_cp_rank
    megatron_random.CudaRNGStatesTracker = CpuRngStatesTracker
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state


def rebind(rebinding: Rebinding) -> None:
    """Replace the function's literals (and attribute names) in place, so that every importer sees the change."""
    function = unwrap(getattr(rebinding.function, "__func__", rebinding.function))
    code: CodeType = function.__code__
    missing = [old for old in rebinding.literals if old not in _literals(code)]
    if missing:
        raise ValueError(
            f"{function.__module__}.{function.__qualname__} no longer holds {', '.join(map(repr, missing))}: "
            f"training on a CPU needs megatron-core {' or '.join(VERSIONS)} as it was released"
        )
    function.__code__ = code.replace(
        co_consts=tuple(_replaced(constant, rebinding.literals) for constant in code.co_consts),
        co_names=tuple(rebinding.literals.get(name, name) for name in code.co_names),
    )


def _literals(code: CodeType) -> set[str]:
    tuples = (constant for constant in code.co_consts if isinstance(constant, tuple))
    flat = [*code.co_consts, *code.co_names, *(item for constant in tuples for item in constant)]
    return {item for item in flat if isinstance(item, str)}


def _replaced(constant: Any, literals: dict[str, str]) -> Any:
    if isinstance(constant, str):
        return literals.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_replaced(item, literals) for item in constant)
    return constant


def _on_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: ProcessGroup) -> torch.Tensor:
    """Return this rank's positions. Megatron's own function needs pinned memory, which CPU builds of PyTorch lack."""
    own = cp_positions(pos_emb.size(seq_dim), cp_group.rank(), cp_group.size())
    return pos_emb.index_select(seq_dim, own)


def _get_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
