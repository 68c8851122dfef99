"""Warnings on data that repeat themselves, and none on others."""

import re
from pathlib import Path

import pytest
from fake_run import FakeRun

from srlm_mega.data.repeats import warnings_on
from srlm_mega.report.lineage import seed_text

SEED = {"usable": 180, "duplicate_texts": 0, "near_duplicates": 2, "eft_eval_prompts": 20, "validation": 10, "ift": 50}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (SEED, ""),
        (SEED | {"near_duplicates": 20}, ""),  # of 100
        (SEED | {"near_duplicates": 178}, "178 of 258 prompts .* seed_data.near_duplicate_rouge_l"),
        (SEED | {"duplicate_texts": 100}, "100 of 280 prompts .* is the same"),
        ({"pairs": 3}, ""),
    ],
)
def test_large_shares_are_warned_of(counts: dict[str, float], said: str) -> None:
    found = warnings_on(counts)
    assert len(found) == bool(said) and all(re.search(said, warning) for warning in found)


def test_the_seed_data_are_shown_with_their_warnings(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path / "run")
    fake.commit("seed", {"ift.jsonl": []}, 1.0, SEED | {"near_duplicates": 178})
    assert "178 of 258" in seed_text(tmp_path / "run").splitlines()[-1]
