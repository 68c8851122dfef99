"""The same road on real inputs: OpenAssistant trees, Self-Instruct tasks, Llama 2's tokenizer, an untrained model."""

from pathlib import Path

import pytest
from places import ROOT
from test_main_road import contents, srlm

from srlm_mega.records import Candidate, Judgement, SftExample, read_jsonl
from srlm_mega.run.run_dir import RunDir


@pytest.mark.extra
def test_an_untrained_judge_stops_the_run_with_code_3(tmp_path: Path, shared_data: Path) -> None:
    folder = tmp_path / "run"
    arguments: list[str | Path] = [
        "run",
        ROOT / "launch/configs/oasst_cpu.yaml",
        f"run.dir={folder}",
        f"model.tokenizer={shared_data / 'llama2_tokenizer.model'}",
        f"seed_data.path={shared_data / 'oasst_sample.trees.jsonl'}",
        f"prompts.path={shared_data / 'self_instruct_seed_tasks.jsonl'}",
        *("seed_data.num_eft_sources=8", "seed_data.num_eft_eval=4", "sft.train_iters=2", "prompts.per_round=4"),
    ]
    done = srlm(*arguments)
    assert done.code == 3, done.output
    assert "stopped: round_1/pairs" in done.output and "no `Score: x` that can be read" in done.output
    assert "Traceback" not in done.output

    run = RunDir(folder)
    eft = run.manifest("eft")
    assert eft is not None and eft.rows == eft.counts["any_try"] == 0 < eft.counts["prompts"]
    for stage in (
        "seed",
        "M0",
        "sft_baseline",
        "eft",
        "M1",
        "M1/evaluation",
        "round_1/prompts",
        "round_1/candidates",
        "round_1/judgements",
    ):
        assert run.manifest(stage) is not None, stage
    assert run.manifest("round_1/pairs") is None
    ift = list(read_jsonl(folder / "seed/ift.jsonl", SftExample))
    assert len(ift) > 10 and all(example.source == "oasst" for example in ift)
    candidates = list(read_jsonl(folder / "round_1/candidates/candidates.jsonl", Candidate))
    judgements = list(read_jsonl(folder / "round_1/judgements/judgements.jsonl", Judgement))
    assert len(judgements) == 3 * len(candidates) > 0
    assert (folder / "report.html").is_file() and (folder / "summary.json").is_file()

    before = contents(folder)
    again = srlm(*arguments)
    assert again.code == 3 and again.seconds < done.seconds
    assert contents(folder) == before


def test_a_broken_seed_line_is_named_and_too_many_stop_the_run(tmp_path: Path, shared_data: Path) -> None:
    lines = (shared_data / "oasst_sample.trees.jsonl").read_bytes().splitlines(keepends=True)
    broken = tmp_path / "trees.jsonl"
    broken.write_bytes(b"".join([*lines[:3], lines[3][:100] + b"\n", *lines[4:]]))
    done = srlm(
        "run",
        ROOT / "launch/configs/oasst_cpu.yaml",
        f"run.dir={tmp_path / 'run'}",
        f"model.tokenizer={shared_data / 'llama2_tokenizer.model'}",
        f"seed_data.path={broken}",
        f"prompts.path={shared_data / 'self_instruct_seed_tasks.jsonl'}",
    )
    assert done.code == 2 and "line 4" in done.output and "Traceback" not in done.output
    assert not (tmp_path / "run/seed").exists()
