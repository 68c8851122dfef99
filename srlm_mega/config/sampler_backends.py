"""The sampler's backends, and what the rest of the program must know of each."""

from dataclasses import dataclass
from typing import Literal, assert_never

SamplerBackend = Literal["huggingface", "trtllm_torch", "trtllm_engine"]


@dataclass(frozen=True, kw_only=True)
class BackendTraits:
    """What a backend can do, and what its processes need."""

    needs_gpu: bool  # it does not compute on CPUs
    needs_mpi: bool  # its processes start as MPI ranks
    splits_model: bool  # one replica may hold the model on several GPUs (TP, PP)
    quantizes: bool  # it can load FP8 weights
    loads_engine: bool  # a built TensorRT engine in place of a Hugging Face folder


def traits_of(backend: SamplerBackend) -> BackendTraits:
    """The one place where each backend says what it is. AssertionError names an unknown backend."""
    match backend:
        case "huggingface":
            return BackendTraits(
                needs_gpu=False, needs_mpi=False, splits_model=False, quantizes=False, loads_engine=False
            )
        case "trtllm_torch":
            return BackendTraits(needs_gpu=True, needs_mpi=True, splits_model=True, quantizes=True, loads_engine=False)
        case "trtllm_engine":
            return BackendTraits(needs_gpu=True, needs_mpi=True, splits_model=True, quantizes=True, loads_engine=True)
        case _:
            assert_never(backend)
