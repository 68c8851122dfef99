"""A run of version 0.1.0 (commit 810e4c0), stopped by its stop file after step 4 of M2, is finished by this one.

`run_0.1.0.tar.xz` is what `srlm run` left of it, without logs. Its model has one layer of width 4.
"""

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from places import ROOT

from srlm_mega.config import Config
from srlm_mega.config.compatibility import REMOVED, RENAMED, changed
from srlm_mega.config.file import load_config
from srlm_mega.config.knobs import knobs
from srlm_mega.controller.loop import check_finished
from srlm_mega.errors import UserError
from srlm_mega.evaluation.intervals import Interval
from srlm_mega.launch.cores import with_cores
from srlm_mega.report.page import render
from srlm_mega.report.summary import build_summary
from srlm_mega.run.identity import identity_of
from srlm_mega.run.manifest import IDENTITY, MANIFEST
from srlm_mega.run.plan import find_stage, plan
from srlm_mega.run.run_dir import RunDir

OLD = Path(__file__).parent / "run_0.1.0.tar.xz"
STEPS_MADE, STEPS = 4, 40


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """The old run's folder."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return RunDir(tmp_path / "run")


def configured(run: RunDir, *overrides: str) -> Config:
    return load_config(run.config_file, [f"run.dir={run.root}", *overrides])


def resume(run: RunDir, config: Config) -> Path:
    """Accept what is finished, and begin the half-trained M2: its folder with the checkpoint in it."""
    check_finished(plan(config), config, run)
    return run.begin(identity_of(find_stage(config, "M2"), config, run), resumable=True)


def rewrite(run: RunDir, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the recorded configuration in every manifest and in the half-trained stage's identity."""
    for path in run.root.rglob(MANIFEST):
        fields = orjson.loads(path.read_bytes())
        path.write_bytes(orjson.dumps(fields | {"config": change(fields["config"])}))
    path = run.partial("M2") / IDENTITY
    stage, config, inputs = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps([stage, change(config), inputs]))


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {key: value for key, value in config.items() if key not in keys}


@pytest.mark.slow
def test_an_older_run_is_finished_and_its_outputs_stay(run: RunDir, srlm: Path) -> None:
    manifests = {path: path.read_bytes() for path in run.root.rglob(MANIFEST)}
    begun = (run.partial("M2") / "metrics.jsonl").read_text()
    assert len(manifests) == 10 and begun.count("\n") == STEPS_MADE
    argv = [str(srlm), "run", str(run.config_file), f"run.dir={run.root}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in manifests} == manifests
    metrics = (run.output("M2") / "metrics.jsonl").read_text()
    assert metrics.startswith(begun), "training begins after its checkpoint, not at its first step"
    assert [orjson.loads(line)["step"] for line in metrics.splitlines()] == list(range(1, STEPS + 1))
    assert run.manifest("M2/evaluation") is not None


def test_an_older_run_has_a_report_without_intervals_of_its_judge(run: RunDir) -> None:
    """It kept no pairs by prompt; four prompts are too few for an interval of quality. Give its judge an accuracy."""
    assert build_summary(run.root).models["M1"].intervals.judge_accuracy is None, "none of its judgements had a score"
    path = run.output("M1/evaluation") / "evaluation.json"
    path.write_text(path.read_text().replace('"pair_acc_half": null', '"pair_acc_half": 0.75'))
    found = build_summary(run.root).models["M1"].intervals
    assert found.judge_accuracy == Interval(0.75) and found.quality_sampled == Interval(0.0, None, None, 4)
    page = render(run.root)
    assert "Judge accuracy (ties count half) is 75.0% (M1, 95% interval unknown)" in page
    assert "24 IFT + 8 EFT" in page and "32 examples, 2 steps of 4" in page


def test_threads_that_a_configuration_leaves_open_stay_the_old_ones(run: RunDir) -> None:
    config = configured(run, "launch.threads_per_process=null")
    assert (resume(run, with_cores(config, run)) / "megatron").exists()


def test_options_that_an_older_version_did_not_have_count_as_their_defaults(run: RunDir) -> None:
    """As if 0.1.0 had not known any of the keys that this run leaves at their defaults."""
    config = configured(run)
    rewrite(run, lambda recorded: {
        key: value for key, value in recorded.items() if key not in knobs() or value != knobs()[key].default
    })  # fmt: skip
    assert "dpo.beta" not in orjson.loads((run.partial("M2") / IDENTITY).read_bytes())[1]
    assert (resume(run, config) / "megatron").exists()
    with pytest.raises(UserError, match=r"- pairs\.min_gap: was 0\.0, now 0\.5\n.*--redo round_1/pairs"):
        resume(run, configured(run, "pairs.min_gap=0.5"))
    with pytest.raises(UserError, match=r"M2\.partial.*another configuration.*\n  - dpo\.beta: was 0\.1, now 0\.5"):
        resume(run, configured(run, "dpo.beta=0.5"))


def test_an_option_within_a_section_that_may_be_absent_counts_as_its_default(run: RunDir) -> None:
    rewrite(run, without("pretrain.adam_eps", "evaluation.pairwise_judge"))
    assert resume(run, configured(run)).exists()
    with pytest.raises(UserError, match=r"- pretrain\.adam_eps: was 1e-08, now 0\.1\n"):
        resume(run, configured(run, "pretrain.adam_eps=0.1"))
    with pytest.raises(
        UserError, match=r"M1/evaluation.*\n(.*\n)*  - evaluation\.pairwise_judge\.model: was None, now 'j'"
    ):
        resume(run, configured(run, "evaluation.pairwise=true", "evaluation.pairwise_judge.model=j"))


def test_a_section_that_was_absent_is_not_its_defaults(run: RunDir) -> None:
    """Early stopping was off: each of its keys that is read now is another value, default or not."""
    with pytest.raises(UserError, match=r"early_stopping\.eval_interval: was None, now 200\n"):
        resume(run, configured(run, "early_stopping.judge.model=j"))


def test_a_model_from_outside_was_asked_in_llama_2s_format() -> None:
    """There was no other, whatever template its folder has: the format of a run may not change within it."""
    old: dict[str, Any] = {"model.path": "models/x"}
    assert changed(old, {**old, "model.chat_template": "auto"}) == {"model.chat_template": ("llama2", "auto")}
    assert changed(old, {**old, "model.chat_template": "llama2"}) == {}
    assert changed({"model.path": None}, {"model.path": None, "model.chat_template": "auto"}) == {}


def test_removed_and_renamed_options(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that had its last default is ignored, another value is refused and named; a new name is the same option."""
    monkeypatch.setitem(REMOVED, "dpo.gone", 3)
    monkeypatch.setitem(RENAMED, "dpo.inverse_temperature", "dpo.beta")
    rewrite(run, lambda config: without("dpo.beta")(config) | ({"dpo.gone": 3, "dpo.inverse_temperature": 0.1}
                                                               if "dpo.beta" in config else {}))  # fmt: skip
    config = configured(run)
    assert (resume(run, config) / "megatron").exists()
    rewrite(run, lambda config: config | ({"dpo.gone": 4} if "dpo.gone" in config else {}))
    with pytest.raises(UserError, match=r"M2\.partial.*\n  - dpo\.gone: was 4, now 3"):
        resume(run, config)


def test_a_configuration_file_with_removed_and_renamed_options(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resolved file of an old run names every option of its version; a file may not give one under both names."""
    wanted = configured(run, "judge.n=2")
    monkeypatch.setitem(REMOVED, "dpo.gone", 3)
    monkeypatch.setitem(RENAMED, "judging.samples.k", "judge.n")
    text = run.config_file.read_text().replace("dpo:\n", "dpo:\n  gone: 3\n").replace("  n: 1\n", "")
    run.config_file.write_text(f"{text}judging: {{samples: {{k: 2}}}}\n")
    assert configured(run) == wanted
    assert configured(run, "judging.samples.k=3").judge.n == 3 == configured(run, "judge.n=3").judge.n
    said = capsys.readouterr().err
    assert said.count("sampler.slurm, runtime.sampler.take_over_seconds is now sampler.take_over_seconds, judging") == 1
    assert said.count(", judging.samples.k is now judge.n\n") == 1 and "gone" not in said
    assert said.count("override 'judging.samples.k=3': judging.samples.k is now judge.n\n") == 1
    text = run.config_file.read_text().replace("gone: 3", "gone: 4")
    run.config_file.write_text(text.replace("\njudge:\n", "\njudge:\n  n: 2\n"))
    with pytest.raises(UserError, match="2 problem") as error:
        configured(run)
    assert "judging.samples.k is now judge.n, which is given too: remove one of them" in str(error.value)
    assert "dpo.gone was removed, and srlm now behaves as with 3: remove the key; got 4" in str(error.value)
