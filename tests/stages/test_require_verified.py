"""A converted folder that nobody verified is refused wherever a folder from outside is sampled."""

from pathlib import Path

import pytest
from places import ROOT
from sampling_run import write_model

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.verify import prove
from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.file import load_config
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import UserError
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.base import take_writer
from srlm_mega.stages.head_to_head import writer_at
from srlm_mega.stages.judges import open_judge
from srlm_mega.stages.work import Work

TOY = ROOT / "launch/configs/toy_cpu.yaml"
REFUSED = "converted was converted and not verified: srlm convert verify .*source .*converted"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A model folder that a conversion made."""
    write_model(load_config(TOY), tmp_path / "source", toy_tokenizer())
    wish = Wish(Kind.HUGGINGFACE, dtype=DType.BFLOAT16)
    convert(tmp_path / "source", tmp_path / "converted", wish, Resources(), no_bar)
    return tmp_path / "converted"


def verify(converted: Path) -> None:
    prove(converted.with_name("source"), converted, no_bar).save()


def writing(folder: Path, writer: Path, *overrides: str) -> Work:
    """A run that is about to take its writer."""
    config = load_config(TOY, [f"prompts.writer={writer}", *overrides])
    run, stage = RunDir(folder), find_stage(config, "prompt_writer")
    work = Work(
        run,
        config,
        stage,
        run.partial(stage.name),
        Progress(folder / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    return work


def test_the_writer_of_prompts(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        take_writer(writing(tmp_path / "refused", converted))
    take_writer(writing(tmp_path / "told", converted, "model.allow_unverified=true"))
    verify(converted)
    take_writer(writing(tmp_path / "verified", converted))


def test_a_local_judge(converted: Path) -> None:
    judge, sampler = PairwiseJudgeConfig(model=str(converted), max_new_tokens=4), load_config(TOY).sampler
    with pytest.raises(UserError, match=REFUSED):
        open_judge(judge, sampler, False, 1)
    open_judge(judge, sampler, True, 1).close()
    verify(converted)
    open_judge(judge, sampler, False, 1).close()


def test_the_folder_of_a_command(converted: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        writer_at(converted)
    verify(converted)
    assert writer_at(converted).folder == converted
