"""The whole loop as its users start it: `srlm run` in a process of its own, at small size."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest
from browser import browser
from places import ROOT

from srlm_mega.records import Candidate, Judgement, PreferencePair, Prompt, read_jsonl
from srlm_mega.run.manifest import MANIFEST, log_name
from srlm_mega.run.run_dir import RunDir

SMALL = [
    "run.rounds=1",
    "seed_data.num_documents=3000",
    "seed_data.num_ift=200",
    "seed_data.num_eft=200",
    "seed_data.num_eft_eval=80",
    "seed_data.num_validation=20",
    "pretrain.train_iters=120",
    "sft.train_iters=60",
    "dpo.train_iters=6",
    "dpo.global_batch_size=8",
    "dpo.micro_batch_size=8",
    "prompts.per_round=40",
    "sampler.shard_size=8",
    "trainer.save_interval=50",
]
# Differ between two runs of the same thing: clock times, and what names the run itself.
TIMED = {"provenance.json", "summary.json", "report.html", "config.yaml", ".lock"}


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    output: str
    seconds: float


def srlm(*arguments: str | Path) -> Finished:
    """One command, to its end."""
    start = time.monotonic()
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    return Finished(done.returncode, done.stdout + done.stderr, time.monotonic() - start)


def command(*arguments: str | Path) -> list[str]:
    return [str(Path(sys.executable).parent / "srlm"), *map(str, arguments)]


def small_run(folder: Path, *overrides: str) -> list[str | Path]:
    """The arguments of a small toy run."""
    return ["run", ROOT / "launch/configs/toy_cpu.yaml", f"run.dir={folder}", *SMALL, *overrides]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = srlm(*small_run(folder))
    assert done.code == 0, done.output
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on time; manifests without their seconds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or log_name(name) or path.name in TIMED or name.startswith("logs/"):
            continue
        found[name] = without_seconds(path) if path.name == MANIFEST else path.read_bytes()
    return found


def without_seconds(manifest: Path) -> bytes:
    fields = orjson.loads(manifest.read_bytes())
    del fields["seconds"], fields["seal"]
    fields["config"].pop("run.dir", None)
    return orjson.dumps(fields)


def files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if path.is_file():
                yield path


def test_an_impossible_redo_loses_nothing(whole: Path) -> None:
    before = contents(whole)
    done = srlm(*small_run(whole, "--redo", "M2", "sft.lr=0.01"))
    assert done.code == 2 and "sft.lr" in done.output
    assert contents(whole) == before


def test_a_finished_run_does_nothing_and_says_so(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in files(whole) if path.name != ".lock"}
    (whole / "stop").touch()  # asked for as the run ended
    done = srlm(*small_run(whole))
    assert done.code == 0 and "Nothing to do" in done.output
    assert {path: path.stat().st_mtime_ns for path in files(whole) if path.name != ".lock"} == before


def test_lineage_of_a_pair(whole: Path) -> None:
    pair = next(read_jsonl(whole / "round_1/pairs/pairs.jsonl", PreferencePair))
    prompts = {prompt.id: prompt for prompt in read_jsonl(whole / "round_1/prompts/prompts.jsonl", Prompt)}
    candidates = {one.id: one for one in read_jsonl(whole / "round_1/candidates/candidates.jsonl", Candidate)}
    chosen = candidates[pair.chosen_id]
    assert prompts[chosen.prompt_id].text == pair.prompt[0].content
    assert chosen.token_ids == pair.chosen_token_ids and chosen.model_hash == RunDir(whole).digest("M1")
    shown = srlm("show", "pair", pair.id, whole)
    assert shown.code == 0
    for judgement in read_jsonl(whole / "round_1/judgements/judgements.jsonl", Judgement):
        if judgement.candidate_id in (pair.chosen_id, pair.rejected_id):
            assert judgement.text in shown.output and str(judgement.seed) in shown.output
    absent = srlm("show", "pair", "nothing", whole)
    assert absent.code == 2 and pair.id in absent.output


def test_first_dpo_loss_is_ln_2_and_metrics_have_trls_names(whole: Path) -> None:
    first = orjson.loads((whole / "M2/metrics.jsonl").read_bytes().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    } <= first.keys()
    assert {"grad_norm", "learning_rate"} <= first.keys()


def test_summary_has_the_final_table(whole: Path) -> None:
    summary = orjson.loads((whole / "summary.json").read_bytes())
    assert list(summary["models"]) == ["M1", "M2"]
    for row in summary["models"].values():
        assert {
            "quality_sampled",
            "quality_greedy",
            "win_vs_m1",
            "tie_vs_m1",
            "loss_vs_m1",
            "mean_length",
            "pairs",
        } <= row.keys()
        assert {"pair_acc_untied", "tie_rate", "parse_failure"} <= row["judge"].keys()
    row = summary["models"]["M2"]
    assert 0 < row["logprob_difference_mean"] <= row["logprob_difference_max"] < 1e-4, "sampler and trainer agree"
    assert row["win_vs_m1"] + row["tie_vs_m1"] + row["loss_vs_m1"] == pytest.approx(1)
    assert set(summary["seconds"]) >= {"seed", "M0", "M1", "round_1/pairs", "M2", "M2/evaluation"}
    assert "<html" in (whole / "report.html").read_text(encoding="utf-8")


@pytest.mark.timing
def test_the_report_opens_in_a_browser(whole: Path, tmp_path: Path, artifacts: Path) -> None:
    """Of a run that really ran: every prompt is in the explorer, and leads to its candidates."""
    with browser(tmp_path / "profile") as tab:
        tab.look()
        tab.open(whole / "report.html", "#prompt=r1-p00007")
        tab.wait("document.getElementById('tree').textContent.includes('prompt r1-p00007')")
        assert tab.run("document.querySelectorAll('#tree .card').length") == 4
        assert tab.run("document.querySelectorAll('figure svg').length") == 10
        tab.key("/")
        tab.type("r1-p0001")
        assert tab.run("document.getElementById('found').textContent") == "1–10 of 10", "in place of what was there"
        tab.key("Escape")
        assert tab.run("document.getElementById('found').textContent") == "1–20 of 40"
        tab.screenshot(artifacts / "report_toy.png", whole=True)
        assert tab.complaints == []


def test_status_lists_every_stage(whole: Path) -> None:
    shown = srlm("status", whole)
    assert shown.code == 0 and shown.output.count("done") == 12 and "missing" not in shown.output
    counts = srlm("show", "seed", whole)
    assert counts.code == 0 and "ift.jsonl" in counts.output and "200" in counts.output


def test_a_failed_attempt_leaves_a_finished_run_as_it_was(whole: Path) -> None:
    """A second round that cannot begin: its folder's name is taken by a file."""

    def files() -> dict[str, bytes]:
        found = {str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        return {name: content for name, content in found.items() if not name.startswith("logs/")}

    before = files()
    (whole / "round_2").write_text("")
    done = srlm(*small_run(whole, "run.rounds=2"))
    (whole / "round_2").unlink()
    assert done.code == 2 and "round_2" in done.output
    assert files() == before
    shown = srlm("status", whole)
    assert shown.output.count("done") == 12 and "missing" not in shown.output


def test_another_configuration_is_refused(whole: Path) -> None:
    before = contents(whole)
    done = srlm(*small_run(whole, "dpo.beta=0.2"))
    assert done.code == 2
    assert "dpo.beta: was 0.1, now 0.2" in done.output and "--redo M2" in done.output and "run.dir" in done.output
    assert contents(whole) == before


def test_an_altered_output_is_refused(whole: Path) -> None:
    path = whole / "round_1/pairs/pairs.jsonl"
    content = path.read_bytes()
    try:
        for damaged, said in (
            (content.replace(b"Score", b"score", 1).swapcase(), "was altered"),
            (content[:-1], "bytes"),
        ):
            path.write_bytes(damaged)
            done = srlm(*small_run(whole))
            assert done.code == 2 and said in done.output and "--redo round_1/pairs" in done.output
            assert "Traceback" not in done.output
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "launch/configs/toy_cpu.yaml", "dpo.bta=1"], "Did you mean dpo.beta"),
        (["run", "absent.yaml"], "no configuration file"),
        (["status", "nowhere"], "not a run folder"),
        (["stage", "nowhere", "M1"], "not a run folder"),
        (["run", "launch/configs/toy_cpu.yaml", "--redo", "M9", "run.dir=runs/none"], "no stage M9"),
        (["run", "launch/configs/toy_cpu.yaml", "run.dir=[x"], "not YAML"),
        (["run", "launch/configs/toy_cpu.yaml", "run.dir=README.md"], "README.md"),
        (["run", "launch/configs/toy_cpu.yaml", "run.dir=launch"], "not a run folder"),
        (["run", "launch/configs/toy_cpu.yaml", "dpo.lr=fast"], "valid number"),
        (["run", "launch/configs/llama2_70b_64gpu.yaml"], "not a Slurm allocation"),
        (["run", "launch/configs/llama2_7b_8gpu.yaml"], "model.path: there is no models/Llama-2-7b-hf"),
        (["run", "launch/configs/toy_cpu.yaml", "parallel.data_parallel_size=3"], "the world size is 2"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(arguments: list[str], said: str) -> None:
    done = srlm(*arguments)
    assert done.code == 2, done.output
    assert said in done.output and "Traceback" not in done.output


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    done = srlm(*small_run(tmp_path / "run", "pretrain=null", "model.path=/no/such/model"))
    assert done.code == 2 and "/no/such/model" in done.output and "Traceback" not in done.output
    assert not (tmp_path / "run").exists()
