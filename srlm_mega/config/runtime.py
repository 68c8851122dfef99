"""How and where models are sampled, and how stages are watched."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from srlm_mega.config.sampler_backends import BackendTraits, SamplerBackend, traits_of
from srlm_mega.config.section import Decides, Section


class SamplerConfig(Section, decides="output"):
    """How a model is sampled, and where. Where it is sampled, and on how much, changes no completion."""

    backend: SamplerBackend = Field(
        "huggingface", description="trtllm_torch: a Hugging Face folder, bf16 or FP8; trtllm_engine: a built engine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="backend=huggingface: where it computes.")
    batch_size: int = Field(64, ge=1, description="Sequences per forward pass.")
    shard_size: int = Field(256, ge=1, description="Requests per shard: what a killed stage repeats at most.")
    tp_size: int = Field(1, ge=1, description="GPUs that share a layer; TensorRT-LLM only.")
    pp_size: int = Field(1, ge=1, description="Stages of layers, a GPU each; TensorRT-LLM only.")
    max_num_tokens: int = Field(8192, ge=1, description="trtllm_torch: tokens per forward pass.")
    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="trtllm_torch: how the cache is stored.")
    kv_cache_fraction: float = Field(0.9, gt=0, lt=1, description="TensorRT-LLM: share of free GPU memory for it.")
    quantization: Literal["fp8"] | None = Field(
        None, description="TensorRT-LLM: linear layers in FP8; every model is converted, and verified."
    )
    calibration_size: int = Field(256, ge=1, description="FP8: IFT examples whose activations set its ranges.")
    calibration_probe: int = Field(16, ge=1, description="FP8: of those, how many try the ranges of the model before.")
    calibration_margin: float = Field(
        1.1, ge=1, description="FP8: activations up to this many times a range keep it for the next model."
    )
    attempts: int = Field(3, ge=1, description="Tries of a batch, and then of each of its requests alone.")
    max_failed_share: Annotated[float, Decides("limit")] = Field(
        0.01, ge=0, lt=1, description="Requests of a stage that may fail for good, as a share; more stop the run."
    )
    python: Annotated[Path | None, Decides("nothing")] = Field(
        None, description="Python of the sampler's environment; none: the trainer's."
    )
    container: Annotated[str | None, Decides("nothing")] = Field(
        None, description="Container image to sample in: docker, with Slurm pyxis."
    )
    mounts: Annotated[tuple[Path, ...], Decides("nothing")] = Field(
        (), description="Folders the container sees besides the working directory."
    )
    num_devices: Annotated[int, Decides("nothing")] = Field(
        1, ge=1, description="GPUs (processes, on a CPU) for sampling; replicas share them."
    )
    devices_per_node: Annotated[int, Decides("nothing")] = Field(
        8, ge=1, description="GPUs of a node; a larger replica takes several nodes."
    )
    slurm: Annotated[bool, Decides("nothing")] = Field(
        False, description="Start replicas by srun in this allocation, TensorRT-LLM's with pmix."
    )
    take_over_seconds: Annotated[float, Decides("nothing")] = Field(
        1800.0, gt=0, description="A shard that takes a replica longer than this is given to another one too."
    )

    @property
    def traits(self) -> BackendTraits:
        """What the configured backend can do, and what its processes need."""
        return traits_of(self.backend)

    @property
    def converts(self) -> bool:
        """Whether it loads something else than the trainer's Hugging Face folders."""
        return self.traits.loads_engine or self.quantization is not None

    @property
    def devices_per_replica(self) -> int:
        """GPUs that hold the model once."""
        return self.tp_size * self.pp_size

    @property
    def elsewhere(self) -> bool:
        """Whether the sampler's processes start in another way than the trainer's."""
        return self.python is not None or self.container is not None or self.slurm


class RuntimeConfig(Section, decides="nothing"):
    """How `srlm run` watches stages. Changing this makes no stage another one."""

    progress_timeout_minutes: float = Field(
        120.0,
        gt=0,
        description="A stage that does not train and shows no progress for so long is ended, its stacks "
        "in the log. Longer than the longest shard, prompt generation's batch and evaluation's part.",
    )
