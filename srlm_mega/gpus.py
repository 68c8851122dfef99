"""GPUs and the links between them: NVIDIA's data-sheet figures, for MFU and for the planner."""

import re
from dataclasses import dataclass
from typing import assert_never

from srlm_mega.config.model_sizes import GIB
from srlm_mega.config.training import Precision
from srlm_mega.errors import UserError


@dataclass(frozen=True)
class PeakTflops:
    """Dense peaks of matrix products in TFLOP/s, without sparsity."""

    bf16: float
    fp8: float | None  # None: no FP8 units

    def of(self, precision: Precision) -> float | None:
        """Return the peak in TFLOP/s; None for fp32, and for fp8 without FP8 units."""
        match precision:
            case "fp32":
                return None
            case "bf16":
                return self.bf16
            case "fp8":
                return self.fp8
            case _:
                assert_never(precision)


A100, B200, GB200 = PeakTflops(312.0, None), PeakTflops(2250.0, 4500.0), PeakTflops(2500.0, 5000.0)
H100_SXM, H100_PCIE, H100_NVL = PeakTflops(989.4, 1978.9), PeakTflops(756.0, 1513.0), PeakTflops(835.5, 1671.0)
H20, L40S = PeakTflops(148.0, 296.0), PeakTflops(362.0, 733.0)

# By the exact name that the driver gives. A name that is not here has no MFU: a slice of a device, or a variant with
# another power limit, is another device.
PEAKS_BY_DRIVER_NAME: dict[str, PeakTflops] = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": H100_PCIE,
    "NVIDIA H100 NVL": H100_NVL,
    "NVIDIA H200": H100_SXM,
    "NVIDIA H200 NVL": H100_NVL,
    "NVIDIA GH200 480GB": H100_SXM,
    "NVIDIA H800": H100_SXM,
    "NVIDIA H20": H20,
    "NVIDIA L40S": L40S,
    "NVIDIA B200": B200,
    "NVIDIA GB200": GB200,
}


def peak_tflops(device_name: str | None, precision: Precision) -> float | None:
    """Return the dense peak of one device in TFLOP/s; None where it is not known (CPUs, other GPUs, fp32)."""
    peak = PEAKS_BY_DRIVER_NAME.get(device_name or "")
    return None if peak is None else peak.of(precision)


@dataclass(frozen=True)
class GpuModel:
    """One GPU in its usual server. Bandwidths are per GPU and direction; peaks are dense.

    `sustained` is the share of its own peak that large matrix products keep under the power limit, relative to an
    H100 SXM at 700 W. It is an assumption for every GPU but the H100 (most calibration points are H100s).
    """

    name: str
    peak: PeakTflops
    memory_tbps: float  # TB/s
    memory_gib: float  # what the driver offers
    nvlink_gbps: float  # GB/s
    network_gbps: float  # GB/s
    gpus_per_nvlink: int = 8  # ranks that reach one another by NVLink
    sustained: float = 1.0
    capability: tuple[int, int] = (9, 0)  # CUDA's compute capability; Hopper's
    words: str = ""  # that may stand in its name beside ours

    @property
    def memory_bytes(self) -> float:
        """Memory of the device, in bytes."""
        return self.memory_gib * GIB

    def require_fp8(self) -> None:
        """Raise UserError for a GPU without FP8 units."""
        if self.peak.fp8 is None:
            raise UserError(f"{self.name} has no FP8 units: plan with bf16, or for another GPU")

    def teraflops(self, precision: Precision) -> float:
        """Return the peak of matrix products in TFLOP/s; fp32 is TF32. Without FP8 units, fp8 has the peak of bf16."""
        return self.peak.bf16 / 2 if precision == "fp32" else self.peak.of(precision) or self.peak.bf16

    def flops_per_second(self, precision: Precision) -> float:
        """Return the peak of matrix products in FLOP/s."""
        return self.teraflops(precision) * 1e12

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of the device's memory, in bytes/s."""
        return self.memory_tbps * 1e12

    def is_called(self, words: set[str]) -> bool:
        """Tell whether these words name it: those of our name but a size, others that go with it, its GB of memory."""
        ours = {word for word in self.name.split("-") if not SIZE.fullmatch(word)}
        others = words - ours - set(self.words.split())
        sizes = [SIZE.fullmatch(word) for word in others]
        return ours <= words and all(size is not None and self.has_about(int(size[1])) for size in sizes)

    def has_about(self, gigabytes: int) -> bool:
        """Tell whether it is sold with so many GB of memory; the driver offers a little less."""
        return 0.9 * gigabytes < self.memory_gib < 1.02 * gigabytes

    def group_bandwidth(self, size: int, stride: int) -> float:
        """Return the bytes/s per rank of a ring collective over `size` ranks that are `stride` apart.

        Ranks of one node share their node's network cards: `members` of them use `members` cards.
        """
        members = max(1, min(size, self.gpus_per_nvlink // stride))
        if size <= members:
            return self.nvlink_gbps * 1e9
        return min(self.nvlink_gbps, self.network_gbps * members) * 1e9

    def neighbour_bandwidth(self, size: int, stride: int) -> float:
        """Return the bytes/s of messages between neighbours of a group: the slowest hop decides."""
        return (self.nvlink_gbps if size * stride <= self.gpus_per_nvlink else self.network_gbps) * 1e9


H100_500W_CLOCK = 0.85  # (500 W / 700 W) ** 0.5: power grows with about the square of the clock near the limit
# A name that fits several means the first. Network: 200 Gb/s (A100) or 400 Gb/s per GPU, as in DGX servers. PCIe cards
# have a bridge between two or four, or only the bus, and half the power: they are assumed to keep 0.85 as much.
# Blackwell's share goes with the root of its power per peak (1,000 W, 1,100 W, 1,200 W, 1,400 W), a GB200's being 0.96.
GPUS = (
    GpuModel("a100", A100, 2.04, 79.3, 300, 25, sustained=1.2, capability=(8, 0), words="sxm sxm4 hbm2e"),
    GpuModel("a100-40gb", A100, 1.555, 39.4, 300, 25, sustained=1.2, capability=(8, 0), words="sxm sxm4 hbm2"),
    GpuModel("a100-pcie", A100, 1.935, 79.3, 300, 25, 2, sustained=1.02, capability=(8, 0), words="hbm2e"),
    GpuModel("a100-pcie-40gb", A100, 1.555, 39.4, 300, 25, 2, sustained=1.02, capability=(8, 0), words="hbm2"),
    GpuModel("a800", A100, 2.04, 79.3, 200, 25, sustained=1.2, capability=(8, 0), words="sxm sxm4 hbm2e"),
    GpuModel("l40s", L40S, 0.864, 44.4, 32, 25, 1, capability=(8, 9), words="pcie gddr6"),
    GpuModel("h100", H100_SXM, 3.35, 79.6, 450, 50, words="sxm sxm5 hbm3"),
    GpuModel("h100-500w", H100_SXM, 2.4, 94.5, 450, 50, sustained=H100_500W_CLOCK, words="sxm sxm5 hbm2e"),
    GpuModel("h100-pcie", H100_PCIE, 2.0, 79.6, 300, 25, 2, sustained=0.85, words="hbm2e"),
    GpuModel("h100-nvl", H100_NVL, 3.9, 93.6, 300, 25, 2, sustained=0.85, words="pcie hbm3"),
    GpuModel("h800", H100_SXM, 3.35, 79.6, 200, 50, words="sxm sxm5 hbm3"),
    GpuModel("h20", H20, 4.0, 95.6, 450, 50, words="sxm sxm5 hbm3"),
    GpuModel("h200", H100_SXM, 4.8, 139.8, 450, 50, words="sxm sxm5 hbm3e"),
    GpuModel("h200-nvl", H100_NVL, 4.8, 139.8, 450, 50, 4, sustained=0.85, words="pcie hbm3e"),
    GpuModel("gh200", H100_SXM, 4.0, 94.5, 450, 50, words="hbm3 480gb"),
    GpuModel("gh200-144gb", H100_SXM, 4.9, 141.0, 450, 50, words="hbm3e 480gb"),
    GpuModel("b200", B200, 8.0, 178.3, 900, 50, sustained=0.92, capability=(10, 0), words="sxm sxm6 hbm3e"),
    GpuModel("b300", B200, 8.0, 268.0, 900, 100, sustained=0.97, capability=(10, 3), words="sxm sxm6 hbm3e"),
    GpuModel("gb200", GB200, 8.0, 184.0, 900, 50, 64, sustained=0.96, capability=(10, 0), words="nvl72 hbm3e"),
    GpuModel("gb300", GB200, 8.0, 277.0, 900, 100, 64, sustained=1.04, capability=(10, 3), words="nvl72 hbm3e"),
)
MAKER = frozenset(("nvidia", "dgx", "hgx", "tensor", "core", "gpu"))
SIZE = re.compile(r"(\d+)(?:g|gb|gib)?")  # of its memory


def find_gpu(name: str) -> GpuModel:
    """Return a GPU by our name or a published one, such as H100-SXM-80GB or a100-40. UserError for others: every word
    must be known, and belong to that GPU, and so must a size of memory."""
    words = set(re.split(r"[-_/ ]+", name.strip().lower())) - MAKER
    for gpu in GPUS:
        if gpu.is_called(words):
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(f"unknown GPU {name!r}: give one of {known}, or describe it in a file (--gpu-file)")
