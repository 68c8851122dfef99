"""Killed and stopped trainings go on: to the same bytes in the same layout, to 1e-5 in another.

Four launches: two processes until one is killed, eight (TP2 x PP2 x DP2), two again, and one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import twin
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timing]
TOLERANCE = 1e-5
WORKER = Path(__file__).parent / "resume_worker.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launches write; `models/start` is what they train."""
    root = tmp_path_factory.mktemp("resume")
    twin.save_start(root / "models/start", seed=0, tied=False)
    return root


@pytest.fixture(scope="module")
def results(out: Path, launch: Callable[..., str]) -> dict[str, Any]:
    """What every launch said, by its name."""
    merged = {}
    for name, processes in (("before_kill", 2), ("eight", 8), ("after_kill", 2), ("single", 1)):
        is_killed = name == "before_kill"
        said = launch(processes, WORKER, name, out / "models", out, ends_with=1 if is_killed else 0)
        assert ("exitcode: -9" in said) == is_killed, said[-4000:]
        merged[name] = json.loads((out / f"{name}.json").read_text())
    return merged


def difference(out: Path, one: str, other: str) -> float:
    """Largest difference of any weight of two exported models."""
    first, second = (load_file(out / name / "huggingface/model.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def untimed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of metrics.jsonl does not tell about time or memory."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "padding_fraction")
    return [{key: line[key] for key in kept} for line in metrics]


def test_a_killed_run_ends_in_the_same_bytes(results: dict[str, Any], out: Path) -> None:
    """Dropout is on, the optimizer distributed and its communication overlapped, and the kill came two steps behind
    the newest checkpoint."""
    exported = "huggingface/model.safetensors"
    assert (out / "killed" / exported).read_bytes() == (out / "whole_dp2" / exported).read_bytes()
    before, after = results["before_kill"], results["after_kill"]
    assert untimed(after["killed"]["metrics"]) == untimed(before["whole DP2"]["metrics"])


def test_random_states_matter(results: dict[str, Any], out: Path) -> None:
    """Negative control: the same resume without them."""
    assert difference(out, "fresh_dropout", "whole_dp2") > 1e-4


@pytest.mark.parametrize(
    ("name", "asked_in"), [("stop file", 4), ("signal", 3)], ids=["stop file", "SIGUSR1 to one rank, async saves"]
)
def test_asked_to_stop(results: dict[str, Any], out: Path, name: str, asked_in: int) -> None:
    """The step at work is the last one; the rest ends in the same bytes."""
    stopped = results["before_kill"][name]
    assert stopped["ended"] == f"StopRequested: stopped after step {asked_in} of 6. The same command resumes from there"
    assert [line["step"] for line in stopped["metrics"]] == list(range(1, asked_in + 1))
    assert difference(out, name.replace(" ", "_"), "whole_tp2") == 0
    lines = untimed(results["after_kill"][name]["metrics"])
    assert lines == untimed(results["before_kill"]["whole TP2"]["metrics"])


def test_the_newest_checkpoints_are_kept(results: dict[str, Any]) -> None:
    """Of three, two."""
    assert results["before_kill"]["kept"] == ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]


def test_a_kill_behind_the_last_step_costs_what_follows_the_newest_checkpoint(
    results: dict[str, Any], out: Path
) -> None:
    """Training keeps its checkpoints: the commit removes them."""
    assert results["after_kill"]["checkpoints"] == ["iter_0000002", "iter_0000004"]
    assert results["after_kill"]["killed again"]["ended"] == "finished"
    assert difference(out, "killed", "whole_dp2") == 0


def test_with_a_checkpoint_of_the_last_step_only_the_export_is_left(results: dict[str, Any], out: Path) -> None:
    stopped, again = results["single"]["skipped to the end"], results["single"]["only exported"]
    assert stopped["ended"].startswith("CannotContinue: steps 4 to 6") and again["ended"] == "finished"
    assert again["metrics"] == stopped["metrics"] and len(again["metrics"]) == 6
    assert (out / "skipped_to_the_end/huggingface/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["TP1 x PP2", "TP2", "single"])
def test_another_layout_goes_on_with_the_run_of_eight(results: dict[str, Any], out: Path, name: str) -> None:
    """Written by TP2 x PP2 x DP2 after step 4."""
    assert results["eight"]["stopped"]["ended"].startswith("StopRequested: stopped after step 4")
    assert difference(out, name, "eight_whole") < TOLERANCE
    metrics = results["single" if name == "single" else "after_kill"][name]["metrics"]
    for got, want in zip(metrics, results["eight"]["whole"]["metrics"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=TOLERANCE)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=TOLERANCE)
        assert got["learning_rate"] == want["learning_rate"]


def test_optimizer_state_matters(results: dict[str, Any], out: Path) -> None:
    """Negative control: the same resume without it."""
    assert difference(out, "without_optimizer", "eight_whole") > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "said"), [("altered", "was altered: its xxh3-128 is"), ("missing", "is missing, but")]
)
def test_a_damaged_checkpoint_is_refused(results: dict[str, Any], out: Path, name: str, said: str) -> None:
    ended = results["single"][name]["ended"]
    assert ended.startswith("UserError: the checkpoint") and said in ended and "__0_0.distcp" in ended
    assert "nothing was overwritten" in ended
    unchanged = (out / "eight/metrics.jsonl").read_bytes()
    assert (out / name / "metrics.jsonl").read_bytes() == unchanged and not (out / name / "huggingface").exists()


def test_an_incomplete_checkpoint_is_passed_over(results: dict[str, Any], out: Path) -> None:
    assert results["single"]["incomplete"]["ended"] == "finished"
    assert difference(out, "incomplete", "single") == 0


def test_the_other_optimizer_is_refused(results: dict[str, Any]) -> None:
    assert "parallel.use_distributed_optimizer=True: resume" in results["single"]["other optimizer"]["ended"]


def test_a_step_that_is_no_number_is_skipped(results: dict[str, Any]) -> None:
    """Its items are named, and training goes on with the learning rates of the others."""
    skipped = results["single"]["one skipped"]
    assert skipped["ended"] == "finished" and [line["step"] for line in skipped["metrics"]] == [1, 2, 3, 4, 5, 6]
    line = skipped["metrics"][2]
    assert len(line["skipped"]) == 8 and line["skipped"][0].startswith("s") and line["loss"] is None
    assert all("skipped" not in line for line in skipped["metrics"] if line["step"] != 3)
    rates = [line["learning_rate"] for line in results["eight"]["whole"]["metrics"]]
    assert [line["learning_rate"] for line in skipped["metrics"]] == rates


def test_three_in_a_row_stop_the_run(results: dict[str, Any], out: Path) -> None:
    stopped = results["single"]["three skipped"]
    assert stopped["ended"].startswith("CannotContinue: steps 2 to 4: the loss or the gradients were NaN or inf")
    assert [len(line.get("skipped", ())) for line in stopped["metrics"]] == [0, 8, 8, 8]
    assert results["single"]["gone on behind"]["ended"] == "finished"


@pytest.mark.parametrize("optimizer", ["plain", "distributed", "bf16"])
def test_gradients_that_are_no_numbers_change_nothing(results: dict[str, Any], optimizer: str) -> None:
    """Neither weights nor the optimizer's state; sound gradients do."""
    assert results["single"]["updates"][optimizer] == {"norm": "nan", "unchanged": True, "control": False}
