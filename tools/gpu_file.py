"""A GPU that a user describes in a file, for `srlm plan` and `srlm rehearse`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from srlm_mega.config.strict_yaml import load_yaml
from srlm_mega.errors import UserError
from srlm_mega.gpus import GpuModel, PeakTflops, find_gpu
from srlm_mega.records import complaint


class GpuFile(BaseModel):
    """The keys of the file: dense peaks in TFLOP/s, bandwidths per GPU and direction."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    bf16_tflops: PositiveFloat
    fp8_tflops: PositiveFloat | None = None  # without FP8 units
    memory_tbps: PositiveFloat  # TB/s
    memory_gib: PositiveFloat  # what the driver offers
    nvlink_gbps: PositiveFloat  # GB/s to the GPUs of its NVLink domain, or over its bus
    network_gbps: PositiveFloat  # GB/s of its share of the node's network cards
    gpus_per_nvlink: PositiveInt = 8
    sustained: PositiveFloat = 1.0  # share of its peak that it keeps, relative to an H100 at 700 W
    capability: tuple[int, int] = (9, 0)  # CUDA's compute capability


def chosen_gpu(name: str | None, path: Path | None) -> GpuModel:
    """Return the GPU of a name, by default h100, or of a file. UserError for both, and for what neither describes."""
    if path is None:
        return find_gpu("h100" if name is None else name)
    if name is not None:
        raise UserError("--gpu and --gpu-file do not go together: give one of them")
    return read_gpu_file(path)


def read_gpu_file(path: Path) -> GpuModel:
    """Read a YAML or JSON file. UserError has a line for every mistake in it."""
    try:
        described = GpuFile.model_validate(load_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--gpu-file {path}: {error.strerror}") from None
    except ValidationError as error:
        keys = ", ".join(GpuFile.model_fields)
        raise UserError(f"{path} does not describe a GPU: {complaint(GpuFile, error)}; its keys are {keys}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path} is not YAML: {error}") from None
    fields = described.model_dump()
    return GpuModel(peak=PeakTflops(fields.pop("bf16_tflops"), fields.pop("fp8_tflops")), **fields)
