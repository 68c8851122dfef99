"""A converted folder that nobody verified, and one that was altered since, are refused wherever a folder from outside
is sampled or converted."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT
from sampling_run import begin_run, write_model
from typer.testing import CliRunner

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.verify import prove
from srlm_mega.cli.main import app
from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.file import load_config
from srlm_mega.controller.start_checks import check_sampled_models
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import UserError
from srlm_mega.evaluation.results import Comparison
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.base import make_base, take_writer
from srlm_mega.stages.head_to_head import writer_at
from srlm_mega.stages.judges import local_judge, open_judge
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
    return begun(folder, "prompt_writer", f"prompts.writer={writer}", *overrides)


def given(folder: Path, model: Path) -> Work:
    """A run that is about to take its base model."""
    return begun(folder, "M0", f"model.path={model}", "pretrain=null")


def begun(folder: Path, name: str, *overrides: str) -> Work:
    config = load_config(TOY, overrides)
    run, stage = RunDir(folder), find_stage(config, name)
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


def test_a_judge_whose_path_was_recorded_is_the_same_by_another_path(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions recorded it."""
    monkeypatch.chdir(converted.parent)
    settings = PairwiseJudgeConfig(model=str(converted))
    for recorded in ("converted", str(converted)):
        made = Comparison("new", "old", recorded, 1, 0, 0, 0, 0, None, None)
        assert local_judge(settings, True, RunDir(converted.parent), [("M1", made)]) is not None
    with pytest.raises(UserError, match=r"has another model .*--redo M1"):
        local_judge(settings, True, RunDir(converted.parent), [("M1", replace(made, judge="source"))])


def test_a_local_judge_is_refused_at_the_start(converted: Path) -> None:
    """And not once a model was trained."""
    key = "evaluation.pairwise_judge.model"
    given = ("evaluation.pairwise=true", f"evaluation.pairwise_judge={{model: {converted}}}")
    with pytest.raises(UserError, match=rf"{key}: .*{REFUSED}"):
        check_sampled_models({key}, load_config(TOY, given))
    check_sampled_models({key}, load_config(TOY, [*given, "model.allow_unverified=true"]))
    verify(converted)
    check_sampled_models({key}, load_config(TOY, given))


def test_the_folder_of_a_command(converted: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        writer_at(converted)
    verify(converted)
    assert writer_at(converted).folder == converted


def test_one_flipped_bit_of_a_weight_is_never_taken(converted: Path, tmp_path: Path) -> None:
    verify(converted)
    flip_bit(converted / "model.safetensors")
    altered = r"converted/model\.safetensors is not what was verified .*srlm convert verify .*source .*converted"
    judge, sampler = PairwiseJudgeConfig(model=str(converted), max_new_tokens=4), load_config(TOY).sampler
    with pytest.raises(UserError, match=altered):
        take_writer(writing(tmp_path / "writer", converted))
    with pytest.raises(UserError, match=altered):
        open_judge(judge, sampler, False, 1)
    with pytest.raises(UserError, match=altered):
        writer_at(converted)
    for argv in (
        ["convert", converted, tmp_path / "other", "--to", "trtllm"],
        ["convert", "verify", converted, converted],
    ):
        error = CliRunner().invoke(app, [str(word) for word in argv]).exception
        assert isinstance(error, UserError) and re.search(altered, str(error)), error
    with pytest.raises(UserError, match=rf"model\.path: .*{altered}"):
        make_base(given(tmp_path / "base", converted))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_run_s_model_is_taken_as_its_manifest_says(tmp_path: Path, name: str) -> None:
    """Given as a folder, it has no proof: its manifest is one."""
    folder = begin_run(tmp_path / "toy", ["unused"]).weights("M1")
    assert writer_at(folder).folder == folder
    flip_bit(folder / name)
    for take in (
        lambda: writer_at(folder),
        lambda: take_writer(writing(tmp_path / "writer", folder)),
        lambda: open_judge(PairwiseJudgeConfig(model=str(folder)), load_config(TOY).sampler, False, 1),
    ):
        with pytest.raises(UserError, match=rf"M1/huggingface/{re.escape(name)} was altered"):
            take()


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
