"""The sampler: its backends, and how and where models are sampled; the watch over stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, assert_never

from pydantic import Field

from srlm_mega.config.section import Decides, Section

SamplerBackend = Literal["huggingface", "vllm", "trtllm_torch", "trtllm_engine"]


@dataclass(frozen=True, kw_only=True)
class BackendTraits:
    """Abilities of a sampler backend, and needs of its processes."""

    needs_gpu: bool  # it does not compute on CPUs
    needs_mpi: bool  # its processes start as MPI ranks
    splits_model: bool  # one replica may hold the model on several GPUs (TP, PP)
    quantizes: bool  # it can load FP8 weights
    loads_engine: bool  # a built TensorRT engine in place of a Hugging Face folder
    continuous: bool  # its engine works on requests of several shards at once, so bits depend on who shares a batch


def traits_of(backend: SamplerBackend) -> BackendTraits:
    """Return the traits of a backend: the one place that knows them. AssertionError names an unknown backend."""
    match backend:
        case "huggingface":
            return BackendTraits(
                needs_gpu=False,
                needs_mpi=False,
                splits_model=False,
                quantizes=False,
                loads_engine=False,
                continuous=False,
            )
        case "vllm":
            return BackendTraits(
                needs_gpu=False, needs_mpi=False, splits_model=True, quantizes=True, loads_engine=False, continuous=True
            )
        case "trtllm_torch":
            return BackendTraits(
                needs_gpu=True, needs_mpi=True, splits_model=True, quantizes=True, loads_engine=False, continuous=True
            )
        case "trtllm_engine":
            return BackendTraits(
                needs_gpu=True, needs_mpi=True, splits_model=True, quantizes=True, loads_engine=True, continuous=True
            )
        case _:
            assert_never(backend)


def default_shard_size(backend: SamplerBackend) -> int:
    """Return the number of requests of a shard where none is configured."""
    return 16 if traits_of(backend).continuous else 256


class SamplerConfig(Section, decides="output"):
    """Backend, decoding and processes of the sampler. Where it runs, and on how many GPUs, changes no completion."""

    backend: SamplerBackend = Field(
        "huggingface",
        description="transformers, vLLM, or TensorRT-LLM on a folder (trtllm_torch) or engine (trtllm_engine, ending).",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device of huggingface and vllm.")
    batch_size: int = Field(64, ge=1, description="Number of sequences per forward pass.")
    shard_size: int | None = Field(
        None,
        ge=1,
        description="Requests per shard, which a kill repeats; null: 256 for huggingface, 16 for engines, which "
        "work on several shards at once.",
    )
    tp_size: int = Field(1, ge=1, description="GPUs that share each layer (vLLM, TensorRT-LLM).")
    pp_size: int = Field(1, ge=1, description="Pipeline stages, a GPU each (vLLM, TensorRT-LLM).")
    max_num_tokens: int = Field(
        8192, ge=1, description="Largest number of tokens per forward pass (vllm, trtllm_torch)."
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="Number format of the KV cache (vllm, trtllm_torch); auto: FP8 with quantization=fp8, since such a "
        "folder asks for it, else 16 bits.",
    )
    kv_cache_fraction: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="Share of free GPU memory for the KV cache (TensorRT-LLM); of a GPU's memory for all of vLLM, "
        "or, on CPUs, of free memory for its KV cache, of which it takes about 4 GiB at most.",
    )
    scheduler_policy: Literal["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"] = Field(
        "MAX_UTILIZATION",
        description="Requests that TensorRT-LLM lets in: as many as run now, some of which it must stop and compute "
        "again; or as many as fit with max_new_tokens each.",
    )
    batch_wait_timeout_iters: int | None = Field(
        32,
        ge=0,
        description="Iterations for which new prompts wait to be computed together (trtllm_torch; null: its default).",
    )
    batch_wait_max_tokens_ratio: float | None = Field(
        0.5, ge=0, le=1, description="Share of max_num_tokens at which they no longer wait (trtllm_torch)."
    )
    allreduce_strategy: Literal["NCCL", "AUTO", "ONESHOT", "TWOSHOT"] = Field(
        "NCCL",
        description="Sum over tp_size GPUs (trtllm_torch). NVIDIA's reinforcement learning takes NCCL: with several "
        "replicas the default (AUTO) spoilt convergence.",
    )
    quantization: Literal["fp8"] | None = Field(
        None, description="FP8 linear layers (vLLM, TensorRT-LLM): every model is converted, and verified."
    )
    calibration_size: int = Field(256, ge=1, description="IFT examples whose activations set FP8's ranges.")
    calibration_probe: int = Field(16, ge=1, description="Calibration examples that try the last model's FP8 ranges.")
    calibration_margin: float = Field(
        1.1, ge=1, description="Factor up to which activations may exceed an FP8 range that is kept for the next model."
    )
    logprobs: bool = Field(
        True, description="Log-probabilities of the candidates, which the check of sampler against trainer reads."
    )
    attempts: int = Field(3, ge=1, description="Tries of a batch, and then of each of its requests alone.")
    max_failed_share: Annotated[float, Decides("limit")] = Field(
        0.01, ge=0, lt=1, description="Largest share of a stage's requests that may fail for good; more stop the run."
    )
    python: Annotated[Path | None, Decides("nothing")] = Field(
        None, description="Python of the sampler's environment; null: the trainer's."
    )
    container: Annotated[str | None, Decides("nothing")] = Field(
        None, description="Container image to sample in, by docker or, with Slurm, pyxis; null: none."
    )
    mounts: Annotated[tuple[Path, ...], Decides("nothing")] = Field(
        (), description="Folders that the container sees besides the working directory."
    )
    num_devices: Annotated[int, Decides("nothing")] = Field(
        1, ge=1, description="Number of GPUs (on a CPU, processes) for sampling, divided among replicas."
    )
    devices_per_node: Annotated[int, Decides("nothing")] = Field(
        8, ge=1, description="GPUs of each node; a larger replica takes several nodes."
    )
    slurm: Annotated[bool, Decides("nothing")] = Field(
        False, description="Start replicas by srun in this Slurm allocation, TensorRT-LLM's with pmix."
    )
    take_over_seconds: Annotated[float, Decides("nothing")] = Field(
        1800.0, gt=0, description="Seconds after which a replica's unfinished shard is given to another one too."
    )

    @property
    def traits(self) -> BackendTraits:
        """Abilities of the configured backend, and needs of its processes."""
        return traits_of(self.backend)

    @property
    def requests_per_shard(self) -> int:
        """Number of requests of a shard."""
        return self.shard_size or default_shard_size(self.backend)

    @property
    def requests_per_call_shard(self) -> int:
        """Number of requests of a shard where few are sent at a time: so few that every replica has some, but for a
        backend that computes a shard's requests together."""
        return min(4, self.requests_per_shard) if self.traits.continuous else self.requests_per_shard

    @property
    def converts(self) -> bool:
        """True where the sampler loads something else than the trainer's Hugging Face folders."""
        return self.traits.loads_engine or self.quantization is not None

    @property
    def has_fp8_cache(self) -> bool:
        """True where keys and values are kept in FP8: by request, or because an FP8 folder or engine says so itself."""
        return self.kv_cache_dtype == "fp8" or self.quantization == "fp8"

    @property
    def devices_per_replica(self) -> int:
        """Number of GPUs that hold the model once."""
        return self.tp_size * self.pp_size

    @property
    def on_gpus(self) -> bool:
        """True where it is certain that the model computes on GPUs."""
        return self.traits.needs_gpu or self.device == "cuda"

    @property
    def elsewhere(self) -> bool:
        """True where the sampler's processes start in another way than the trainer's."""
        return self.python is not None or self.container is not None or self.slurm


class RuntimeConfig(Section, decides="nothing"):
    """Limits by which `srlm run` watches stages; changing them changes no output."""

    progress_timeout_minutes: float = Field(
        120.0,
        gt=0,
        description="Minutes without progress after which a stage that does not train is ended, with its stacks in the "
        "log; must exceed the longest shard, batch of prompt lists and part of an evaluation.",
    )
