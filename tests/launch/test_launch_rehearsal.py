"""`srlm launch slurm` rehearses training on GPUs before it writes a job; the rehearsal itself is tested elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner, Result

from srlm_mega.cli.main import app
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.launch import slurm
from srlm_mega.tools.rehearsal import rehearse_command
from srlm_mega.tools.rehearsal.rank_places import place_of
from srlm_mega.tools.rehearsal.rehearsal_record import WITHOUT_FP8, RankRecord
from srlm_mega.tools.rehearsal.rehearsal_table import Rehearsed
from srlm_mega.tools.rehearsal.rehearse_command import RehearsalRequest

TOY = ROOT / "launch/configs/toy_cpu.yaml"
Launch = Callable[..., Result]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[RehearsalRequest]:
    """What was to be rehearsed; the rehearsal is played by one that finds a fault in rank 0."""
    found = []

    def rehearse(request: RehearsalRequest) -> Rehearsed:
        found.append(request)
        config = load_config(request.config_file, request.overrides)
        assert (config.launch.launcher, config.launch.nodes) == ("slurm", 2), "it is the job's own configuration"
        failed = RankRecord.failed(0, place_of(config, 0), "20 layers do not divide", 1.0)
        return Rehearsed(config, request.gpu, [failed], [])

    monkeypatch.setattr(rehearse_command, "rehearse", rehearse)
    return found


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """The command, for the toy on two nodes where there is no Slurm."""
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)

    def launched(*arguments: str) -> Result:
        places = [str(TOY), f"run.dir={tmp_path / 'run'}", "--nodes=2"]
        return CliRunner().invoke(app, ["launch", "slurm", *places, *arguments])

    return launched


@pytest.mark.parametrize("submitted", [(), ("--submit",)])
def test_a_failed_rehearsal_writes_and_submits_nothing(
    submitted: tuple[str, ...], launch: Launch, requests: list[RehearsalRequest], tmp_path: Path
) -> None:
    result = launch("trainer.device=cuda", "--gpu=h200", *submitted)
    assert isinstance(result.exception, UserError)
    said = str(result.exception)
    assert "no job was written" in said and "--no-rehearsal" in said and "FAILS: 20 layers do not divide" in said
    assert [request.gpu.name for request in requests] == ["h200"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "writes"),
    [
        (("trainer.device=cuda", "--no-rehearsal"), "run.sbatch"),
        ((), "run.sbatch"),  # it trains on CPUs
        (("trainer.device=cuda", "sampler.device=cuda", "--template=sample", "--stage=round_1/candidates"),
         "sample.sbatch"),
        (("trainer.device=cuda", "--dry-run"), None),
    ],
)  # fmt: skip
def test_what_is_not_rehearsed(
    arguments: tuple[str, ...], writes: str | None, launch: Launch, requests: list[RehearsalRequest], tmp_path: Path
) -> None:
    result = launch(*arguments)
    assert result.exit_code == 0, result.output
    assert requests == [] and (tmp_path / "run").exists() == (writes is not None)
    assert writes is None or len(list((tmp_path / "run/slurm").glob(f"*/{writes}"))) == 1


def test_what_is_known_at_once_is_said_before_a_rehearsal(launch: Launch, requests: list[RehearsalRequest]) -> None:
    result = launch("trainer.device=cuda", "prompts.generator=file", "prompts.path=/no/such.jsonl")
    assert isinstance(result.exception, UserError) and "/no/such.jsonl" in str(result.exception)
    assert requests == []


def test_without_the_packages_a_line_says_so(
    launch: Launch, requests: list[RehearsalRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_mega.cli.launch.find_spec", lambda package: None)
    result = launch("trainer.device=cuda")
    assert result.exit_code == 0 and requests == []
    assert "not rehearsed: torch and megatron cannot be imported here" in result.stderr


FP8 = ("trainer.device=cuda", "trainer.bf16=true", "trainer.fp8=hybrid")


def test_a_job_of_transformer_engine_is_not_refused_for_want_of_it_here(
    launch: Launch, requests: list[RehearsalRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node often has no such package, and the nodes' container does."""
    here = {"torch": True, "megatron": True, "transformer_engine": None}
    monkeypatch.setattr("srlm_mega.cli.launch.find_spec", here.get)
    for options in (FP8, ("trainer.device=cuda", "model.layer_backend=transformer_engine")):
        result = launch(*options)
        assert result.exit_code == 0 and requests == [], result.output
        assert "not rehearsed: transformer_engine cannot be imported here" in result.stderr


@pytest.mark.parametrize("more", [(), ("trainer.fp8_shadow_interval=10", "trainer.first_last_layers_bf16=true")])
def test_fp8_is_rehearsed_in_bf16_and_a_line_says_so(
    more: tuple[str, ...], launch: Launch, requests: list[RehearsalRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is for FP8 alone, too, which the configuration refuses without it."""
    monkeypatch.setattr("srlm_mega.cli.launch.find_spec", lambda package: True)
    result = launch(*FP8, *more)
    assert "rehearsed in bf16: casts to FP8" in result.stderr
    assert "20 layers do not divide" in str(result.exception), "it came to the rehearsal"
    assert [request.overrides for request in requests] == [WITHOUT_FP8]


def test_a_layout_too_large_is_refused_in_the_trainers_words(launch: Launch) -> None:
    """The real rehearsal of one rank, which the trainer's own check ends before anything is built."""
    result = launch(
        "trainer.device=cuda", "parallel.pipeline_model_parallel_size=1", "model.hidden_size=32768",
        "model.ffn_hidden_size=131072", "model.num_layers=8",
    )  # fmt: skip
    assert isinstance(result.exception, UserError)
    assert "more than the 79.60 GiB that cuda:0 has for each process" in str(result.exception)
