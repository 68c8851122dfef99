"""What `srlm bench device` measures, in order of value: on one GPU, or everything tiny on a CPU (`--smoke`)."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from srlm_mega.config.file import load_config
from srlm_mega.config.model_sizes import GIB, GRADIENT_BYTES, optimizer_bytes, weight_bytes
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import environment, srlm_command
from srlm_mega.tools.bench_record import read_record
from srlm_mega.tools.device.run_parts import SUMMARY, Command, DevicePart, DeviceSummary, Skipped, run_parts

TESTS = Path(__file__).resolve().parents[2] / "tests"  # of the clone; absent where a wheel is installed
NVIDIA = Path("/dev/nvidiactl")
MEMORY = "GPU memory"  # the row of device_environment.py
# One process at 7B's width in bf16. Nothing is recomputed, and the loss has no dropout, so that it can be compared.
WIDE = ("llama2_7b_8gpu", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
        "parallel.data_parallel_size=1", "launch.processes_per_node=1", "trainer.recompute_granularity=null",
        "dpo.attention_dropout=0", "dpo.hidden_dropout=0", "dpo.global_batch_size=8",
        "dpo.lr_decay_style=constant", "dpo.min_lr=1e-6", "model.path=null")  # fmt: skip
TINY = ("toy_cpu", "parallel.pipeline_model_parallel_size=1", "launch.processes_per_node=1", "dpo.global_batch_size=4",
        "dpo.lr_decay_style=constant", "dpo.min_lr=8e-5", "dpo.packed_sequence_size=256")  # fmt: skip
MOST_LAYERS = (16, 8, 4, 2)  # of which the most that fit are taken; more would not fit the time
DEFAULT_LAYERS = 4  # where the first part has not run
STATE_SHARE = 0.5  # of the GPU's memory; the rest is for activations
STATE = weight_bytes(bf16=True) + GRADIENT_BYTES + optimizer_bytes(bf16=True)  # bytes of a parameter, of ours
TRL_STATE = 4 * 4 + 2  # fp32 weights, gradients and two means, and what autocast keeps of the weights


def measure_device(minutes: float, out: Path, smoke: bool, only: Sequence[str]) -> DeviceSummary:
    """Run the parts, or those that are named. UserError without a GPU, for a folder that has results, or for a name
    that no part has."""
    if not smoke and not NVIDIA.exists():
        raise UserError(f"there is no GPU here (no {NVIDIA}): --smoke runs everything tiny on the CPU")
    if (out / SUMMARY).exists():
        raise UserError(f"{out} has the results of another time: give a new folder with --out")
    known = smoke_parts(out.absolute()) if smoke else gpu_parts(out.absolute())
    if unknown := set(only) - {part.name for part in known}:
        raise UserError(f"no part is called {', '.join(sorted(unknown))}: {', '.join(part.name for part in known)}")
    out.mkdir(parents=True, exist_ok=True)
    own = {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(out.absolute() / "triton"), "TQDM_DISABLE": "1"}
    own |= {"CUDA_VISIBLE_DEVICES": ""} if smoke else {}
    threads = 1 if smoke else len(os.sched_getaffinity(0))
    settings = environment(os.environ, threads, smoke, one_node=True) | own
    return run_parts([part for part in known if not only or part.name in only], out, minutes, settings)


def gpu_parts(out: Path) -> list[DevicePart]:
    """Return the parts for one GPU, of which the first ones are the most valuable. Their seconds add up to more than
    nine minutes: most need less than they are given."""

    def layers(state_bytes: int) -> str:
        return f"model.num_layers={layers_that_fit(out / 'environment.json', state_bytes)}"

    def training() -> list[str]:
        options = ("--steps", "6", "--warmup", "2", "--json", str(out / "training.json"))
        return [*srlm_command(), "bench", "training", *WIDE, "model.layer_backend=torch", layers(STATE),
                f"run.dir={out / 'unused'}", *options]  # fmt: skip

    def memory() -> Command:
        if not (out / "training.json").is_file():
            return Skipped("the part `training` has no result to compare with")
        return module("memory_check", out / "memory.json", str(out / "training.json"), *WIDE,
                      "model.layer_backend=torch", layers(STATE))  # fmt: skip

    def trl() -> Command:
        return missing("trl", "accelerate", "datasets") or module(
            "trl_baseline", out / "trl.json", *WIDE, "model.layer_backend=torch", layers(STATE + TRL_STATE),
            "--pairs-per-pass=1", "--steps=6", "--warmup=2",
        )  # fmt: skip

    def fp8() -> Command:
        engine = [*WIDE, "model.layer_backend=transformer_engine", layers(STATE), f"run.dir={out / 'unused'}"]
        sweep = ["--sweep", "trainer.fp8=null,hybrid", "--steps", "6", "--warmup", "2"]
        return missing("transformer_engine") or [*srlm_command(), "bench", "training", *engine, *sweep, "--json",
                                                 str(out / "fp8.json")]  # fmt: skip

    # Files by name: collecting all would import packages that a bare machine lacks.
    accuracy = ("gpu/test_gpu_kernels.py", "gpu/test_gpu_attention.py")
    kernel_tests = partial(tests, out / "kernel_tests.json", accuracy, "-m", "gpu", "-k", "not test_training")
    precision = partial(tests, out / "precision.json", ("gpu/test_gpu_precision.py",), "-m", "gpu")
    kernels = ["bench", "kernels", *(f"--shape={name}" for name in ("7b", "7b-masked", "70b-tp8"))]
    return [
        DevicePart("environment", 40, 5, partial(module, "device_environment", out / "environment.json")),
        DevicePart("kernel_tests", 80, 15, kernel_tests),
        DevicePart("kernels", 100, 30, lambda: [*srlm_command(), *kernels, "--json", str(out / "kernels.json")]),
        DevicePart("host_syncs", 40, 15, partial(module, "sync_count", out / "host_syncs.json")),
        DevicePart("training", 90, 40, training),
        DevicePart("memory", 30, 15, memory),
        DevicePart("trl", 90, 45, trl),
        DevicePart("sdpa_lengths", 40, 15, partial(module, "sdpa_lengths", out / "sdpa_lengths.json")),
        DevicePart("precision", 60, 30, precision),
        DevicePart("demo", 60, 40, partial(module, "demo_run", out / "demo.json", str(out / "demo"))),
        DevicePart("fp8", 60, 40, fp8),
    ]


def smoke_parts(out: Path) -> list[DevicePart]:
    """Return the same parts with tiny shapes on a CPU, where no figure means anything."""
    steps = ("--steps=1", "--warmup=1")
    training = ["bench", "training", *TINY, f"run.dir={out / 'unused'}", *steps, "--json", str(out / "training.json")]
    kernels = ["bench", "kernels", "--rounds=2", "--shape=smoke", "--json", str(out / "kernels.json")]
    one_test = (["kernels/test_reference.py"], "-k", "dpo")
    precision = (["gpu/test_gpu_precision.py"], "-k", "bf16_follows_fp32 and shrunken")
    memory = partial(module, "memory_check", out / "memory.json", str(out / "training.json"), *TINY)
    trl = partial(module, "trl_baseline", out / "trl.json", *TINY, "--pairs-per-pass=2", *steps)
    return [
        DevicePart(
            "environment", 60, 0, partial(module, "device_environment", out / "environment.json", "--no-doctor")
        ),
        DevicePart("kernel_tests", 60, 0, partial(tests, out / "kernel_tests.json", *one_test)),
        DevicePart("kernels", 60, 0, lambda: [*srlm_command(), *kernels]),
        DevicePart("host_syncs", 60, 0, partial(module, "sync_count", out / "host_syncs.json")),
        DevicePart("training", 60, 0, lambda: [*srlm_command(), *training]),
        DevicePart("memory", 60, 0, memory),
        DevicePart("trl", 60, 0, lambda: missing("trl", "accelerate", "datasets") or trl()),
        DevicePart("sdpa_lengths", 60, 0, partial(module, "sdpa_lengths", out / "sdpa_lengths.json")),
        DevicePart("precision", 60, 0, partial(tests, out / "precision.json", *precision)),
        DevicePart("demo", 120, 0, partial(module, "demo_run", out / "demo.json", str(out / "demo"))),
        DevicePart("fp8", 60, 0, lambda: Skipped("FP8 needs a GPU and Transformer Engine")),
    ]


def module(name: str, json: Path, *words: str) -> list[str]:
    """Return how a measuring file of this folder starts."""
    return [sys.executable, "-P", "-m", f"srlm_mega.tools.device.{name}", *words, "--json", str(json)]


def tests(json: Path, files: Sequence[str], *options: str) -> Command:
    """Return how tests of the clone are run and recorded."""
    if not TESTS.is_dir():
        return Skipped(f"there are no tests at {TESTS}: start from the clone, with its folder on PYTHONPATH")
    start = [sys.executable, "-P", "-m", "srlm_mega.tools.device.device_tests", "--json", str(json)]
    return missing("pytest", "hypothesis") or [*start, "--", *(str(TESTS / file) for file in files), *options]


def missing(*packages: str) -> Skipped | None:
    """Return why a part is skipped that needs these packages; None where all are installed."""
    absent = [package for package in packages if find_spec(package) is None]
    return Skipped(f"not installed: {', '.join(absent)}") if absent else None


def layers_that_fit(environment_json: Path, state_bytes: int) -> int:
    """Return how many layers of 7B's width one GPU is given, by the memory that the first part found."""
    if not environment_json.is_file():
        return DEFAULT_LAYERS
    available = STATE_SHARE * (read_record(environment_json).row(MEMORY).median or 0.0) * GIB
    sizes = load_config(Path(WIDE[0])).model.sizes
    needs = {layers: replace(sizes, num_layers=layers).parameters * state_bytes for layers in MOST_LAYERS}
    return next((layers for layers, need in needs.items() if need <= available), 1)
