"""python tools/scripts/calibrate_planner.py: fits the planner's factors to published points, and tells its errors.

Least squares of log(predicted / measured), each family of points with the weight of one, large errors counted linearly,
factors pulled to the prior. Leaving out each family in turn gives the error to believe.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.optimize import least_squares

from srlm_mega.config.model_sizes import GIB
from srlm_mega.gpus import find_gpu
from srlm_mega.tools.bench_record import markdown
from srlm_mega.tools.planner.generation import Replica
from srlm_mega.tools.planner.job import Job
from srlm_mega.tools.planner.memory import fullest_stage
from srlm_mega.tools.planner.plan_command import dumps
from srlm_mega.tools.planner.points import CALIBRATION_FILE, Point, read_points
from srlm_mega.tools.planner.shapes import PUBLISHED
from srlm_mega.tools.planner.step_time import NAMES, Quantities, step_quantities

SCATTER = 0.06  # of published figures themselves: the same job differs by this between releases
EXACT = 1e-13  # as far as it goes, so that every machine prints the same digits
Array = NDArray[np.float64]
UNITS = {
    "untuned": "of expected seconds",
    "launches": "seconds per layer and micro batch",
    "hops": "seconds per message",
}
# What kernels and links were expected to do, and how sure that is (a standard deviation of its logarithm): before any
# point was seen, but for attention_ring and untuned.
EXPECTED = {
    "matrices_bf16": (1.39, 0.1),  # 0.72 of the peak: large cuBLAS products under the power limit
    "matrices_fp8": (1.61, 0.1),  # 0.62
    "matrix_bytes": (0.4, 0.5),  # mostly hidden by the arithmetic
    "attention": (2.0, 0.15),  # 0.5 of the bf16 peak, both passes
    "attention_flash2": (2.8, 0.15),  # 0.36: made for the A100
    "attention_ring": (4.2, 0.15),  # blocks merged in fp32, transfers that nothing hides
    "passes": (1.3, 0.2),  # 0.77 of the memory's bandwidth
    "untuned": (0.05, 0.7),  # releases of one framework differ by about so much
    "tensor_parallel": (0.5, 0.4),  # half of it hidden by products
    "tensor_parallel_serial": (1.2, 0.2),  # 0.83 of NVLink
    "context_parallel": (1.0, 0.5),
    "pipeline": (0.5, 0.5),
    "data_parallel": (1.2, 0.5),  # of what the backward pass does not hide
    "launches": (1e-4, 0.5),  # seconds per layer and micro batch
    "hops": (5e-6, 0.7),  # seconds per message
}
PRIOR, SURENESS = (Quantities(*(EXPECTED[name][column] for name in NAMES)) for column in (0, 1))


@dataclass(frozen=True)
class Target:
    """A published figure: Llama 3.3 70B in FP8 on two GPUs, TensorRT-LLM's own tables."""

    gpu: str
    prompt: int
    output: int
    tokens_per_second: float  # output tokens per GPU

    @property
    def predicted(self) -> float:
        """The figure that the planner gives, with more requests than the cache holds."""
        requests = 4096.0
        replica = Replica(PUBLISHED["llama3-70b"], find_gpu(self.gpu), 2, fp8=True, fp8_cache=True)
        seconds = replica.seconds(requests, self.prompt, self.prompt, 1, self.output)
        return requests * self.output / seconds / replica.gpus


TARGETS = (
    Target("h200", 1000, 1000, 2587),
    Target("h100", 1000, 1000, 2209),
    Target("h200", 8192, 1024, 537),
    Target("h100", 8192, 1024, 398),
)


@dataclass(frozen=True)
class PointError:
    """Predicted over measured tokens/s, minus 1: with all points in the fit, and with the point's family left out."""

    point: Point
    measured: float
    fitted: float
    left_out: float


@dataclass(frozen=True)
class Family:
    """Points of one model, task, framework, precision and sequence length; errors with all of them left out."""

    name: str
    points: int
    median: float
    worst: float


@dataclass(frozen=True)
class Calibration:
    """The result of a fit."""

    factors: Quantities
    errors: tuple[PointError, ...]

    def of(self, gpu: str = "", left_out: bool = True) -> list[float]:
        """Return the absolute errors of the points on GPUs whose name begins so."""
        errors = (error for error in self.errors if error.point.job.gpu.name.startswith(gpu))
        return [abs(error.left_out if left_out else error.fitted) for error in errors]

    @property
    def families(self) -> list[Family]:
        """The families, and how far off they are when they are left out."""
        found: dict[str, list[float]] = {}
        for error in self.errors:
            found.setdefault(error.point.family, []).append(abs(error.left_out))
        return [Family(name, len(errors), median(errors), max(errors)) for name, errors in found.items()]

    def summary(self) -> str:
        """Return the figures to report."""
        lines = []
        for words, left_out in (("family left out", True), ("fitted", False)):
            for gpus, name in (("all GPUs", ""), ("H100", "h100")):
                errors = self.of(name, left_out)
                figures = f"median {median(errors):.1%}, worst {max(errors):.1%} of {len(errors)} points"
                lines.append(f"{gpus}, {words}: {figures}")
        return "\n".join(lines)


def main(json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False) -> None:
    """Fit to published points: factors, every point's error, and the error of points whose family was left out."""
    found = calibrate([point for point in read_points(CALIBRATION_FILE) if isinstance(point, Point)])
    print(dumps(calibration_json(found)) if json else calibration_text(found))


def calibrate(points: Sequence[Point]) -> Calibration:
    """Fit the factors to all measured points, and once more without each family."""
    measured = [point for point in points if point.tokens_per_second is not None]
    design = np.array([per_token(point.job) for point in measured])
    target = 1 / np.array([point.tokens_per_second for point in measured], dtype=float)  # GPU seconds per token
    names = np.array([point.family for point in measured])
    weights = np.array([1 / np.sqrt((names == name).sum()) for name in names])
    factors = _fit(design, target, weights)
    left_out = np.zeros(len(measured))
    for family in dict.fromkeys(point.family for point in measured):
        own, others = names == family, names != family
        left_out[own] = target[own] / (design[own] @ _fit(design[others], target[others], weights[others])) - 1
    figures = np.stack([1 / target, target / (design @ factors) - 1, left_out], axis=1).tolist()
    errors = (PointError(point, *row) for point, row in zip(measured, figures, strict=True))
    return Calibration(Quantities(*factors.tolist()), tuple(errors))


def per_token(job: Job) -> Array:
    """Return the quantities [factors] of a step, per token and GPU."""
    return np.array(step_quantities(job).values) * (job.layout.gpus / job.tokens_per_step)


def _fit(design: Array, target: Array, weights: Array) -> Array:
    """Return the factors [factors] that explain `target` [points] by `design` [points, factors]."""
    prior, sureness = np.array(PRIOR.values), np.array(SURENESS.values)

    def residuals(logarithms: Array) -> Array:
        errors = weights * np.log(design @ (prior * np.exp(logarithms)) / target) / SCATTER
        robust = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1))
        return np.concatenate([robust, logarithms / sureness])

    found: Array = prior * np.exp(least_squares(residuals, np.zeros(len(prior)), ftol=EXACT, xtol=EXACT, gtol=EXACT).x)
    return found


def calibration_text(calibration: Calibration) -> str:
    """Return factors, errors by family and by point, memory and the sampler's published figures, as Markdown."""
    factors = [["factor", "fitted", "unit"]]
    for name, value in zip(NAMES, calibration.factors.values, strict=True):
        factors.append([name, f"{value:.3g}", UNITS.get(name, "of data-sheet seconds")])
    families = [["family left out", "points", "median", "worst"]]
    for family in calibration.families:
        name = family.name.replace("|", ", ")
        families.append([name, str(family.points), f"{family.median:.1%}", f"{family.worst:.1%}"])
    errors = [["point", "measured tokens/s/GPU", "fitted", "family left out", "assumed"]]
    memory = [["point", "published GiB", "planned GiB", "error"]]
    for error in calibration.errors:
        point, figures = error.point, [f"{error.measured:,.0f}", f"{error.fitted:+.1%}", f"{error.left_out:+.1%}"]
        errors.append([point.id, *figures, "; ".join(point.assumed)])
        if point.memory_gib is not None:
            planned = fullest_stage(point.job).total / GIB
            off = planned / point.memory_gib - 1
            memory.append([point.id, f"{point.memory_gib:.1f}", f"{planned:.1f}", f"{off:+.1%}"])
    sampling = [["70B FP8, TP 2", "prompt / output", "published tokens/s/GPU", "planned", "error"]]
    for target in TARGETS:
        speeds = target.tokens_per_second, target.predicted
        shown = [f"{speed:,.0f}" for speed in speeds]
        sampling.append([target.gpu, f"{target.prompt} / {target.output}", *shown, f"{speeds[1] / speeds[0] - 1:+.1%}"])
    return "\n\n".join([calibration.summary(), *map(markdown, (factors, families, errors, memory, sampling))])


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """Return factors, summary, and the errors of every family and point, for programs."""
    return {
        "factors": dict(zip(NAMES, calibration.factors.values, strict=True)),
        "summary": calibration.summary().splitlines(),
        "families": [asdict(family) for family in calibration.families],
        "points": [
            {
                "id": error.point.id,
                "family": error.point.family,
                "tokens_per_sec_per_gpu": error.measured,
                "error_fitted": error.fitted,
                "error_family_left_out": error.left_out,
                "assumed": error.point.assumed,
            }
            for error in calibration.errors
        ],
    }


if __name__ == "__main__":
    typer.run(main)
