"""vLLM itself, on CPUs, in an environment of its own: the sampler's contract in fp32 and bf16, two ranks, kills, and
SmolLM2. The tests are those of tests/support/vllm_real.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from places import ROOT
from vllm_environment import environment_with_vllm

pytestmark = pytest.mark.extra
SUPPORT = ROOT / "tests/support"


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with vLLM and srlm-mega."""
    return environment_with_vllm(tmp_path_factory.mktemp("environment"))


def run_there(python: Path, *options: str, **settings: str) -> str:
    """Some tests of vllm_real.py."""
    argv = [
        str(python), "-m", "pytest", "-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(SUPPORT),
        str(SUPPORT / "vllm_real.py"), *options,
    ]  # fmt: skip
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", env={**os.environ, **own, **settings})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_contract_and_what_is_vllms_own(vllm_python: Path, dtype: str) -> None:
    assert " passed" in run_there(vllm_python, "-k", dtype)


def test_ranks_and_the_folders_that_are_refused(vllm_python: Path) -> None:
    assert "3 passed" in run_there(vllm_python, "-k", "ranks or heads")


def test_smollm2(vllm_python: Path, smollm2_gguf: Path, srlm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "huggingface"
    argv = [
        str(srlm),
        "convert",
        str(smollm2_gguf),
        str(folder),
        "--to",
        "huggingface",
        "--dtype",
        "bfloat16",
    ]
    subprocess.run(argv, check=True, capture_output=True)
    assert "1 passed" in run_there(vllm_python, "-k", "real_model", SRLM_VLLM_MODEL=str(folder))


def test_the_doctor_knows_this_environment(vllm_python: Path) -> None:
    srlm = str(vllm_python.parent / "srlm")
    argv = [srlm, "doctor", "--for", "sampling", "--backend", "vllm", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/")
    found = json.loads(done.stdout)
    assert (done.returncode, found["set"]) == (0, "sampling_vllm_cpu"), done.stdout
    assert {row["name"]: row["status"] for row in found["rows"]}["vllm"] == "ok"
