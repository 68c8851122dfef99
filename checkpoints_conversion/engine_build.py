"""`srlm engine build`: an engine in a cache of engines, by NVIDIA's commands in an environment of their own.

(It never ran with TensorRT-LLM; tests run it with stand-ins for the commands.)
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import orjson

from srlm_mega.checkpoints_conversion.build import partial_folder, sync
from srlm_mega.checkpoints_conversion.engine import (
    BuildStep,
    EngineRecord,
    Limits,
    Runtime,
    build_argv,
    next_step,
    refit_argv,
    wanted_record,
    write_record,
)

PROBE = (
    "import json, tensorrt, tensorrt_llm, torch; "
    "print(json.dumps({'tensorrt_llm': tensorrt_llm.__version__, 'tensorrt': tensorrt.__version__, "
    "'gpu_sm': '.'.join(map(str, torch.cuda.get_device_capability()))}))"
)


def probe_runtime(python: str) -> Runtime:
    """Versions and GPU, by the Python that has TensorRT-LLM. ValueError when it has not."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"{python} has no working TensorRT-LLM ({last}): run this in its environment or container, on the GPU "
            "that will run the engine, or name that Python with --python"
        )
    return Runtime(**orjson.loads(done.stdout.strip().splitlines()[-1]))


def build_engine(
    checkpoint: Path, cache: Path, limits: Limits, runtime: Runtime, workers: int
) -> tuple[Path, BuildStep]:
    """The folder of the engine in `cache`, and what it took. RuntimeError when a command fails."""
    wanted = wanted_record(checkpoint, limits, runtime)
    engine, plan = cache / wanted.key, cache / wanted.plan_key
    step = next_step(wanted, cache)
    match step:
        case BuildStep.NOTHING:
            pass
        case BuildStep.BUILD:
            _make(engine, wanted, build_argv(checkpoint, partial_folder(engine), limits, workers))
        case BuildStep.BUILD_AND_REFIT:
            _make(plan, wanted, build_argv(checkpoint, partial_folder(plan), limits, workers))
            _make(engine, wanted, refit_argv(plan, checkpoint, partial_folder(engine)))
        case BuildStep.REFIT:
            _make(engine, wanted, refit_argv(plan, checkpoint, partial_folder(engine)))
    return engine, step


def _make(folder: Path, record: EngineRecord, argv: Sequence[str]) -> None:
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(argv, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(argv)}` ended with code {done.returncode}: see its messages above")
    write_record(partial, record)
    for path in partial.iterdir():
        sync(path)
    os.replace(partial, folder)
    sync(folder.parent)
