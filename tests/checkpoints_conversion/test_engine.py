"""Engines: command lines, records, what fits what, and the cache; NVIDIA's commands are stand-ins."""

import json
import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from model_weights import weights_of
from test_convert import GQA, no_waiting_for_the_disk, there
from test_fp8 import AMAX
from trtllm_commands import commands

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.engine import (
    BuildStep,
    EngineRecord,
    Limits,
    Runtime,
    build_argv,
    build_engine,
    check_engine,
    probe_runtime,
    read_record,
    refit_argv,
    wanted_record,
)
from srlm_mega.checkpoints_conversion.fp8 import Amax
from srlm_mega.checkpoints_conversion.huggingface import write_folder

__all__ = ["no_waiting_for_the_disk"]
RUNTIME = Runtime("1.2.1", "10.14.1", "9.0")
LIMITS = Limits(max_batch_size=8, max_num_tokens=64, max_input_len=32, max_seq_len=64)
# Writes its argv where the real command writes an engine.


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins on the PATH; the file has a line for each call."""
    commands(tmp_path, code=0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "log"


def calls(log: Path) -> list[str]:
    """The commands so far."""
    return log.read_text().split() if log.exists() else []


def checkpoint(tmp_path: Path, name: str = "ckpt", sign: int = 1, amax: Amax | None = None) -> Path:
    """A TensorRT-LLM checkpoint; `sign` -1 is one with other weights of the same size and scales."""
    source = tmp_path / f"model{sign}"
    if not source.exists():
        weights = {key: (tensor * sign).bfloat16() for key, tensor in weights_of(GQA).items()}
        write_folder(source, GQA, weights, tokenizer_from=None)
    if amax is None:
        return there(source, tmp_path / name, Kind.TRTLLM, 2)
    convert(source, tmp_path / name, Wish(Kind.TRTLLM, 2, amax=amax), Resources(), no_bar)
    return tmp_path / name


def test_command_lines() -> None:
    limits = Limits(64, 4096, 1000, 2000, use_fp8_context_fmha=True, strip_plan=True)
    assert " ".join(build_argv(Path("c"), Path("e"), limits, workers=4)) == (
        "trtllm-build --checkpoint_dir c --output_dir e --max_batch_size 64 --max_num_tokens 4096 "
        "--max_input_len 1000 --max_seq_len 2000 --kv_cache_type paged --workers 4 "
        "--use_paged_context_fmha enable --use_fp8_context_fmha enable --strip_plan"
    )
    assert " ".join(refit_argv(Path("p"), Path("c"), Path("e"))) == (
        "trtllm-refit --engine_dir p --checkpoint_dir c --output_dir e"
    )


def test_limits_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"max_input_len 64 must be less than max_seq_len 64"):
        Limits(max_input_len=64, max_seq_len=64)
    with pytest.raises(ValueError, match=r"use_fp8_context_fmha needs use_paged_context_fmha"):
        Limits(use_paged_context_fmha=False, use_fp8_context_fmha=True)


def test_an_engine_is_built_once(tmp_path: Path, log: Path) -> None:
    source, cache = checkpoint(tmp_path), tmp_path / "engines"
    engine, step = build_engine(source, cache, LIMITS, RUNTIME, workers=1)
    assert step is BuildStep.BUILD and calls(log) == ["trtllm-build"]
    assert json.loads((engine / "rank0.engine").read_text())[1] == str(source)
    assert read_record(engine) == wanted_record(source, LIMITS, RUNTIME)
    assert build_engine(source, cache, LIMITS, RUNTIME, workers=1) == (engine, BuildStep.NOTHING)
    assert calls(log) == ["trtllm-build"]
    for limits, runtime in (
        (replace(LIMITS, max_batch_size=4), RUNTIME),
        (LIMITS, replace(RUNTIME, tensorrt="10.15")),
        (LIMITS, replace(RUNTIME, gpu_sm="10.0")),
    ):
        other, step = build_engine(source, cache, limits, runtime, workers=1)
        assert step is BuildStep.BUILD and other != engine


def test_other_weights_are_refitted_into_a_plan(tmp_path: Path, log: Path) -> None:
    limits, cache = replace(LIMITS, strip_plan=True), tmp_path / "engines"
    one, step = build_engine(checkpoint(tmp_path, "one"), cache, limits, RUNTIME, 1)
    assert step is BuildStep.BUILD_AND_REFIT and calls(log) == ["trtllm-build", "trtllm-refit"]
    two, step = build_engine(checkpoint(tmp_path, "two", sign=-1), cache, limits, RUNTIME, 1)
    assert step is BuildStep.REFIT and two != one and calls(log)[2:] == ["trtllm-refit"]
    assert read_record(one).weights_hash != read_record(two).weights_hash


def test_other_scales_need_a_build(tmp_path: Path) -> None:
    """Scales are in the kernels. The same scales with other weights, here of the other sign, do not."""
    limits = replace(LIMITS, strip_plan=True)
    twice = Amax(1, {name: 2 * value for name, value in AMAX.inputs.items()})
    one, same, other = (
        wanted_record(checkpoint(tmp_path, name, sign, amax), limits, RUNTIME)
        for name, sign, amax in (("a", 1, AMAX), ("b", -1, AMAX), ("c", 1, twice))
    )
    assert one.plan_key == same.plan_key != other.plan_key and one.key != same.key


def test_a_failed_build_leaves_nothing(tmp_path: Path, log: Path) -> None:
    commands(tmp_path, code=3)
    with pytest.raises(RuntimeError, match=r"trtllm-build .* ended with code 3"):
        build_engine(checkpoint(tmp_path), tmp_path / "engines", LIMITS, RUNTIME, 1)
    assert [path.suffix for path in (tmp_path / "engines").iterdir()] == [".partial"]
    commands(tmp_path, code=0)
    assert build_engine(checkpoint(tmp_path, "again"), tmp_path / "engines", LIMITS, RUNTIME, 1)[1] is BuildStep.BUILD


def test_ctrl_c_ends_the_workers_of_a_build(tmp_path: Path, log: Path) -> None:
    """They would hold the GPU."""
    command = tmp_path / "bin/trtllm-build"
    command.write_text(f"#!/bin/bash\nsleep 60 &\necho $! >{tmp_path}/worker\nkill -INT $PPID\nwait\n")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a script started the tests
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(checkpoint(tmp_path), tmp_path / "engines", LIMITS, RUNTIME, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    with suppress(ProcessLookupError):
        assert select.select([os.pidfd_open(int((tmp_path / "worker").read_text()))], [], [], 30)[0]


def test_an_engine_of_another_machine_is_refused(tmp_path: Path, log: Path) -> None:
    source = checkpoint(tmp_path)
    engine, _ = build_engine(source, tmp_path / "engines", LIMITS, RUNTIME, 1)
    record = check_engine(engine, RUNTIME, wanted_record(source, LIMITS, RUNTIME).weights_hash, source)
    assert isinstance(record, EngineRecord) and asdict(record)["tp"] == 2
    with pytest.raises(ValueError, match=r"gpu_sm 9\.0 there and 8\.0 here\. Build it: srlm engine build .*ckpt"):
        check_engine(engine, replace(RUNTIME, gpu_sm="8.0"), None, source)
    with pytest.raises(ValueError, match=r"weights_hash .* there and other here"):
        check_engine(engine, RUNTIME, "other", source)


def test_checkpoints_that_no_engine_can_be_built_of(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"use_fp8_context_fmha needs an FP8 checkpoint, and .* is bfloat16"):
        wanted_record(source, replace(LIMITS, use_fp8_context_fmha=True), RUNTIME)
    with pytest.raises(ValueError, match=r"max_seq_len 65 is more than the model's 64 positions"):
        wanted_record(source, replace(LIMITS, max_seq_len=65), RUNTIME)
    with pytest.raises(ValueError, match=r"is no TensorRT-LLM checkpoint"):
        wanted_record(tmp_path / "model1", LIMITS, RUNTIME)


def test_an_environment_without_tensorrt_llm() -> None:
    with pytest.raises(ValueError, match=r"has no working TensorRT-LLM \(ModuleNotFoundError: .*tensorrt"):
        probe_runtime(sys.executable)
