"""A run folder up to where sampling begins, without any training: a seed, a random M1, prompts."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from places import ROOT
from tokenizers import Tokenizer

from srlm_mega.chat.tokenizer_files import write_tokenizer
from srlm_mega.checkpoints_conversion.huggingface import write_folder
from srlm_mega.checkpoints_conversion.random_weights import random_weights
from srlm_mega.config import Config
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.records import Prompt, write_jsonl
from srlm_mega.run.identity import config_of
from srlm_mega.run.manifest import Identity
from srlm_mega.run.plan import find_stage, plan
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.work import Work

CANDIDATES, JUDGEMENTS = "round_1/candidates", "round_1/judgements"


def begin_run(root: Path, prompts: list[str], *overrides: str, tokenizer: Tokenizer | None = None) -> RunDir:
    """Finished outputs `seed`, `M1` and `round_1/prompts`."""
    run = RunDir(root)
    root.mkdir(parents=True)
    config = load_config(ROOT / "launch/configs/toy_cpu.yaml", [f"run.dir={root}", *overrides])
    run.config_file.write_text(to_yaml(config))
    with_files(run, config, "seed", write_seed)
    with_files(run, config, "M1", lambda out: write_model(config, out / "huggingface", tokenizer or toy_tokenizer()))
    records = [Prompt(f"p{number:03d}", text, "test") for number, text in enumerate(prompts)]
    with_files(run, config, "round_1/prompts", lambda out: write_jsonl(out / "prompts.jsonl", records))
    return run


def write_seed(out: Path) -> None:
    """The judge's rubric and the held-out prompts."""
    (out / "judge_template.txt").write_text(TEMPLATE)
    write_jsonl(out / "validation.jsonl", [Prompt(f"v{n}", text, "test") for n, text in enumerate(VALIDATION)])


VALIDATION = ("list 4 animals upper open sure close thanks", "list 2 tools lower open okay close bye")
TEMPLATE = "review {{instruction}} <response> {{response}} </response>"


def with_files(run: RunDir, config: Config, stage: str, write: object) -> None:
    """A finished output whose files `write(folder)` makes, as this configuration would make it."""
    planned = [one for one in plan(config) if one.name == stage]
    identity = Identity(stage, config_of(planned[0], config) if planned else {}, {})
    write(run.begin(identity, resumable=False))  # type: ignore[operator]
    run.commit(identity, 0, 0.0, "test", {})


def write_model(config: Config, folder: Path, tokenizer: Tokenizer, seed: int = 1) -> None:
    """Random weights of the configured shape."""
    generator = torch.Generator().manual_seed(seed)
    write_tokenizer(tokenizer, folder, config.model.seq_length)
    weights = random_weights(config.model.shape, 0.3, generator)
    write_folder(folder, config.model.shape, weights, tokenizer_from=None)


def work_of(run: RunDir, stage: str) -> Work:
    """A stage's work, as its process has it."""
    config = load_config(run.config_file)
    work = Work(
        run,
        config,
        find_stage(config, stage),
        run.partial(stage),
        Progress(run.root / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    return work


def start_stage(run: RunDir, stage: str) -> "subprocess.Popen[bytes]":
    """`srlm stage` as `srlm run` starts it; what it prints lies in logs/."""
    argv = [str(Path(sys.executable).parent / "srlm"), "stage", str(run.root), stage]
    log = run.log_file(stage)
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=dict(os.environ))


def finish_stage(run: RunDir, stage: str) -> bytes:
    """The stage's records."""
    code = start_stage(run, stage).wait(timeout=600)
    assert code == 0, run.log_file(stage).read_text()
    return (run.output(stage) / f"{stage.rpartition('/')[2]}.jsonl").read_bytes()
