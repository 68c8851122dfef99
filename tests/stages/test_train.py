"""The training stages around the trainer: what they refuse before they load a model."""

from dataclasses import replace
from pathlib import Path

import pytest
from places import TOY

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.run.identity import identity_of
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.train import check_reference
from srlm_mega.stages.work import Work


def finish(run: RunDir, config: Config, name: str, content: str) -> None:
    """A finished output with one file."""
    identity = identity_of(find_stage(config, name), config, run)
    folder = run.begin(identity, resumable=False)
    (folder / "file").write_text(content)
    run.commit(identity, 1, 1.0, "0", {})


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """A run that is about to make M2."""
    config = load_config(TOY, [f"run.dir={tmp_path}"])
    run = RunDir(tmp_path)
    for name in ("seed", "M0", "M1", "prompts", "candidates", "judgements", "pairs", "reference"):
        in_round = name in ("prompts", "candidates", "judgements", "pairs", "reference")
        finish(run, config, f"round_1/{name}" if in_round else name, name)
    return Work(
        run,
        config,
        find_stage(config, "M2"),
        run.partial("M2"),
        Progress(tmp_path / "progress.json"),
        Samplers(config, Path("replicas")),
    )


def test_a_reference_of_this_training_is_taken(work: Work) -> None:
    check_reference(work)


@pytest.mark.parametrize("name", ["M1", "round_1/pairs"])
def test_a_reference_of_other_inputs_is_refused(work: Work, name: str) -> None:
    work.run.remove(name)
    finish(work.run, work.config, name, "other weights, another tokenizer, other pairs")
    with pytest.raises(ValueError, match=f"another {name}: .*--redo round_1/reference"):
        check_reference(work)


def test_a_reference_of_another_length_is_refused(work: Work) -> None:
    model = work.config.model.model_copy(update={"seq_length": 64})
    other = replace(work, config=work.config.model_copy(update={"model": model}))
    with pytest.raises(ValueError, match=r"another model\.seq_length: 128, here it is 64"):
        check_reference(other)
