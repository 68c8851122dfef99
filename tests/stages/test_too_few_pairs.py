"""Pairs that fill no batch of DPO are named at stage pairs, before a model reads them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sampling_run import begin_run, with_files, work_of

from srlm_mega.config.file import load_config
from srlm_mega.config.training import ParallelConfig
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.records import Candidate, Judgement, write_jsonl
from srlm_mega.run.manifest import Identity
from srlm_mega.run.run_dir import RunDir
from srlm_mega.stages import train
from srlm_mega.stages.pairing import select_pairs
from srlm_mega.training.topology import Topology

PAIRS = 3
BATCH = ("dpo.train_iters=null", "dpo.epochs=1", "dpo.global_batch_size=4")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A round of which every prompt has a good and a bad answer."""
    run = begin_run(tmp_path / "run", ["list 4 animals"] * PAIRS, *BATCH)
    names = [(f"p{prompt:03d}", f"p{prompt:03d}-c{number}") for prompt in range(PAIRS) for number in range(2)]
    candidates = [
        Candidate(name, prompt, "list 4 animals", name, "stop", 0, "m", (1, 2), (3, place))
        for place, (prompt, name) in enumerate(names)
    ]
    scores = [float(4 - place % 2) for place in range(len(names))]
    judgements = [
        Judgement(f"{name}-j0", name, "", score, "stop", 0, "m") for (_, name), score in zip(names, scores, strict=True)
    ]
    config = load_config(run.config_file)
    with_files(run, config, "round_1/candidates", lambda out: write_jsonl(out / "candidates.jsonl", candidates))
    with_files(run, config, "round_1/judgements", lambda out: write_jsonl(out / "judgements.jsonl", judgements))
    return run


def test_too_few_pairs_for_a_batch_stop_the_run_before_the_reference(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"3 preference pairs from 3 prompts, needed 4 \(one batch: dpo\.global_batch_size=4, dpo\.epochs=1; fewer"
    work = work_of(run, "round_1/pairs")
    with pytest.raises(CannotContinue, match=message):
        select_pairs(work)
    run.commit(Identity("round_1/pairs", {}, {}), PAIRS, 0.0, "test", {})  # as an older version did
    alone = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())
    monkeypatch.setattr(train, "compute_reference", None)
    with pytest.raises(UserError, match=r"3 items do not fill one batch of 4: lower global_batch_size"):
        train.reference(work_of(run, "round_1/reference"), alone)


def test_pairs_that_fill_a_batch_are_enough(run: RunDir) -> None:
    """In several epochs, in a number of steps, where none are trained on, or with one more, of judgements."""
    work = work_of(run, "round_1/pairs")
    for overrides in (
        ["dpo.epochs=2"],
        ["dpo.epochs=null", "dpo.train_iters=1"],
        ["round.method=positives_sft"],
        ["meta_judge.enabled=true", "meta_judge.max_share=0.25"],
    ):
        assert select_pairs(replace(work, config=load_config(run.config_file, overrides))).rows == PAIRS, overrides
