"""The contract of a sampler against TensorRT-LLM itself: `pytest -m gpu tests/gpu` where it is installed. Never run so
far: no machine with it was at hand. tests/sampling/test_sampler_contract.py runs its preparations on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import trtllm_cases
from sampler_contract import *  # noqa: F403
from sampler_contract import END_IDS, GREEDY, Prompts, Ties, flat
from transformers import LlamaForCausalLM
from trtllm_cases import BF16_GAP, FP8_GAP, Case, make_bf16_model, open_case, why_not

from srlm_mega.sampling.huggingface_sampler import HuggingFaceSampler
from srlm_mega.sampling.sampler import Completion, Sampler

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_llm")
    folder = tmp_path_factory.mktemp("model") / "huggingface"
    make_bf16_model(folder)
    return folder


@pytest.fixture(scope="module", params=get_args(Case))
def case(request: pytest.FixtureRequest) -> Case:
    if reason := why_not(request.param):
        pytest.skip(reason)
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def ties(folder: Path, case: Case) -> Ties:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Ties(FP8_GAP if case == "FP8" else BF16_GAP, model)


@pytest.fixture(scope="module")
def sampler(folder: Path, case: Case) -> Iterator[Sampler]:
    sampler = open_case(case, folder)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def greedy(folder: Path, prompts: Prompts) -> list[Completion]:
    """What transformers answers."""
    return without_seeds(HuggingFaceSampler(folder, END_IDS, "cpu", batch_size=64).sample(prompts, GREEDY))


def without_seeds(answers: list[list[Completion]]) -> list[Completion]:
    return [replace(one, seed=0) for one in flat(answers)]


def test_greedy_answers_are_those_of_transformers(
    sampler: Sampler, prompts: Prompts, greedy: list[Completion], ties: Ties
) -> None:
    ties.check(without_seeds(sampler.sample(prompts, GREEDY)), greedy, prompts)


def test_the_launcher_starts_a_sampler(
    folder: Path, prompts: Prompts, greedy: list[Completion], tmp_path: Path
) -> None:
    """One rank, as a replica of one GPU under Slurm is started."""
    for command in ("mpirun", "trtllm-llmapi-launch"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not on the PATH")
    file = Path(trtllm_cases.__file__)
    out = tmp_path / "answers.json"
    argv = ["mpirun", "--allow-run-as-root", "-n", "1", "trtllm-llmapi-launch", sys.executable, file, folder, out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(file.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    answers = [tuple(tokens) for tokens in json.loads(out.read_text())]
    found = [Completion(tokens, "stop" if tokens[-1] in END_IDS else "length", 0) for tokens in answers]
    Ties(BF16_GAP, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)).check(found, greedy, prompts)
