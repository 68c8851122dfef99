"""The sampler's environment: srlm-mega without its dependencies, the light ones, and no torch. TensorRT-LLM is played
by the stand-in."""

import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import ROOT
from sampling_run import CANDIDATES, JUDGEMENTS, begin_run

from srlm_mega.config.file import load_config
from srlm_mega.controller.stage_process import stage_command
from srlm_mega.records import Candidate, Judgement, read_jsonl
from srlm_mega.run.plan import find_stage
from srlm_mega.run.run_dir import RunDir

STAND_IN = ROOT / "tests/support/tensorrt_llm_stand_in"
# What docs/sampling.md tells to install, and what that brings with it.
LIGHT = (
    "jinja2", "numpy", "orjson", "psutil", "pydantic", "rapidfuzz", "regex", "rich", "tenacity", "tokenizers", "typer",
    "xxhash", "yaml",
)  # fmt: skip
THEIRS = (
    "annotated_doc", "annotated_types", "click", "markdown_it", "markupsafe", "mdurl", "pydantic_core", "pygments",
    "shellingham", "typing_extensions", "typing_inspection",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new virtual environment: the light packages by links, srlm-mega by `pip install --no-deps`."""
    folder = tmp_path_factory.mktemp("environment") / "sampler"
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    purelib = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip())
    for name in (*LIGHT, *THEIRS):
        link(name, purelib)
    source = tmp_path_factory.mktemp("source") / "srlm"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "docs", "tests", "build"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel(pip, source)])
    return python


def wheel(pip: list[str], source: Path) -> Path:
    """srlm-mega, built with the setuptools of this environment."""
    run([*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", source / "dist", source])
    (path,) = (source / "dist").glob("srlm_mega-*.whl")
    return path


def link(name: str, purelib: Path) -> None:
    """A package or module of this environment in another one."""
    spec = find_spec(name)
    if spec is None:  # a dependency of another version
        return
    assert spec.origin is not None
    origin = Path(spec.origin)
    target = origin.parent if spec.submodule_search_locations else origin
    (purelib / target.name).symlink_to(target)
    libraries = target.with_name(f"{name}.libs")  # shared libraries of a wheel
    if libraries.is_dir():
        (purelib / libraries.name).symlink_to(libraries)


def run(argv: list[object], **settings: str) -> str:
    """A command's output, with nothing of this environment's paths."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, env=plain | settings, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_light_modules_are_importable_there_and_nothing_heavy_is(environment: Path) -> None:
    light = (
        "cli.main, controller.loop, run.plan, chat, records, config, report.status, stages.sample_and_judge, "
        "stages.prompts, stages.evaluate, sampling.sampler, sampling.shards, sampling.replicas, judging.template, "
        "launch.ranks, launch.sampler_environment"
    )
    names = ", ".join(f"srlm_mega.{name.strip()}" for name in light.split(","))
    assert run([environment, "-c", f"import {names}; print(srlm_mega.cli.main.__file__)"]).startswith(
        str(environment.parent.parent)
    ), "the test must not see the checkout"
    for heavy in ("torch", "transformers", "megatron"):
        assert run([environment, "-c", f"import importlib.util as u; print(u.find_spec({heavy!r}))"]).strip() == "None"


@pytest.mark.extra
def test_stages_sample_there(environment: Path, tmp_path: Path) -> None:
    """As `srlm run` starts them: by one replica in that environment, whose process is started here; then by two."""
    overrides = ["sampler.backend=trtllm_torch", "sampler.shard_size=4", f"sampler.python={environment}"]
    prompts = [f"list {number % 7 + 1} animals upper please" for number in range(12)]
    made = begin_run(tmp_path / "run", prompts, *overrides)
    sample(made, CANDIDATES)
    sample(made, JUDGEMENTS)
    candidates = list(read_jsonl(made.output(CANDIDATES) / "candidates.jsonl", Candidate))
    assert [one.prompt_id for one in candidates] == [f"p{number:03d}" for number in range(12) for _ in range(4)]
    assert len(list(read_jsonl(made.output(JUDGEMENTS) / "judgements.jsonl", Judgement))) == 12 * 4 * 3
    again = begin_run(tmp_path / "again", prompts, *overrides, "sampler.num_devices=2")
    sample(again, CANDIDATES)
    records = [(one.output(CANDIDATES) / "candidates.jsonl").read_bytes() for one in (made, again)]
    assert records[0] == records[1]


def sample(made: RunDir, stage: str) -> None:
    """A stage by the command line that the controller would use."""
    config = load_config(made.config_file)
    argv = stage_command([find_stage(config, stage)], config, made).argv
    assert argv[0] == str(Path(sys.executable).parent / "srlm")
    run([*argv], PYTHONPATH=str(STAND_IN))
