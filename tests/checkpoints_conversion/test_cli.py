"""The commands as users type them, and the bench on a small model."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_convert import GQA, model
from test_fp8 import AMAX
from typer.testing import CliRunner

from srlm_mega.checkpoints_conversion.verify import check_verified
from srlm_mega.cli import convert
from srlm_mega.cli.convert import parse_bytes
from srlm_mega.cli.main import app
from srlm_mega.errors import USER_ERROR, UserError
from srlm_mega.tools import bench_conversion
from srlm_mega.tools.bench_record import read_record


def run(srlm: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command, finished."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(srlm), *words], capture_output=True, text=True, check=False, env=environment)


def test_convert_and_verify(srlm: Path, tmp_path: Path) -> None:
    source, out = str(model(tmp_path / "model")), str(tmp_path / "out")
    done = run(srlm, "convert", source, out, "--to", "trtllm", "--tp", "2", "--pp", "2", "--max-memory", "64KiB")
    assert done.returncode == 0 and done.stdout.startswith(f"{out}: trtllm, bfloat16, "), done.stderr
    verified = run(srlm, "convert", "verify", source, out)
    assert verified.returncode == 0 and "num_tensors       39" in verified.stdout, verified.stderr
    check_verified(tmp_path / "out")
    again = run(srlm, "convert", source, out, "--to", "trtllm")
    assert again.returncode == USER_ERROR and again.stderr.startswith(f"error: {out} exists already: remove it")


def test_fp8_from_a_calibration(srlm: Path, tmp_path: Path) -> None:
    source, out = str(model(tmp_path / "model")), str(tmp_path / "out")
    AMAX.save(tmp_path / "amax.json")
    done = run(
        srlm, "convert", source, out, "--to", "huggingface", "--fp8", "--calibration", str(tmp_path / "amax.json")
    )
    assert done.returncode == 0 and json.loads((tmp_path / "out/conversion.json").read_text())["is_fp8"], done.stderr
    alone = run(srlm, "convert", source, out, "--to", "huggingface", "--fp8")
    assert alone.returncode == USER_ERROR and "--fp8 and --calibration FILE belong together" in alone.stderr
    engine = run(srlm, "engine", "build", source, str(tmp_path / "engines"))
    assert engine.returncode == USER_ERROR and "has no working TensorRT-LLM" in engine.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "megatron"), "Megatron keeps 16-bit weights"),
        (("--to", "trtllm", "--tp", "3"), "3"),
        (("--to", "huggingface", "--tp", "2"), "a Hugging Face folder is not split"),
        (("--to", "trtllm", "--dtype", "float32"), "FP8 is made of 16-bit weights"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_before_the_calibration(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "activation_ranges", lambda *arguments: pytest.fail("it was calibrated"))
    words = ["convert", str(model(tmp_path / "model")), str(tmp_path / "out"), "--fp8", "--calibration", "x.jsonl"]
    error = CliRunner().invoke(app, [*words, *options]).exception
    assert isinstance(error, UserError) and said in str(error), error


@pytest.mark.parametrize(("text", "size"), [("4GiB", 4 << 30), ("512m", 512 << 20), ("1.5K", 1536), ("70000", 70000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "4 GX", "lots"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-memory .* is not a size"):
        parse_bytes(text)


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = bench_conversion.ConversionRequest(jobs=1, plain=False, cold=True, repetitions=1)
    monkeypatch.setitem(bench_conversion.SHAPES, "tiny", replace(GQA, num_query_groups=8, vocab_size=24))
    table = bench_conversion.run_benchmark(tmp_path, "tiny", None, request, tmp_path / "bench.json")
    record = read_record(tmp_path / "bench.json")
    rows = {row.name: row for row in record.rows if row.unit == "s"}
    assert set(rows) == {
        "cp",
        "cp again",
        "to trtllm TP8",
        "trtllm TP8 back",
        "to megatron TP8",
        "to trtllm TP8 FP8",
        "verify",
    }
    assert all(row.samples[0] > 0 and (row.extra["peak_rss_mib"] or 0) < 1024 for row in rows.values())
    assert (rows["cp"].extra["times_cp"] or 0) + (rows["cp again"].extra["times_cp"] or 0) == pytest.approx(2)
    for row in rows.values():
        assert (row.extra["gb_per_second"] or 0) * row.samples[0] == pytest.approx(record.settings["num_bytes"] / 1e9)
    assert min(record.row("FP8 cast of one core").samples) > 0 and "| cp | cold |" in table
    assert not (tmp_path / "bench_conversion").exists()
