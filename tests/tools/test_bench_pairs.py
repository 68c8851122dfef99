"""tools/scripts/bench_pairs.py: a small round, in processes as the large one, every candidate read."""

import json
from pathlib import Path

import pytest

from srlm_mega.judging import rewards
from srlm_mega.judging.rewards import read_rewards, rewards_in
from srlm_mega.tools.scripts.bench_pairs import PER_CANDIDATE, main, make_pairs, measured, write_round


def test_a_small_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(400, tmp_path / "pairs.json")
    record = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    assert (record["settings"]["candidates"], record["settings"]["judgements"]) == (400, 400 * PER_CANDIDATE)
    pairs, metrics = (row["extra"] for row in record["rows"])
    assert 80 < pairs["rows"] <= 100 and metrics["rows"] == 400, "a pair of nearly each prompt"
    assert pairs["peak_mib"] > 10 and pairs["processor_seconds"] > 0
    printed = capsys.readouterr().out
    assert f"{pairs['rows']} rows" in printed and "judge metrics" in printed


def test_a_part_may_start_processes_and_their_work_counts(tmp_path: Path) -> None:
    write_round(tmp_path, 2000)
    alone, both = measured(make_pairs, tmp_path, 2000), measured(with_reader, tmp_path, 2000)
    assert both.rows == 2000
    assert both.peak_mib > alone.peak_mib + 10, "the reader's memory is added"


def with_reader(folder: Path, _: int) -> int:
    path = folder / "judgements.jsonl"
    assert path.stat().st_size < rewards.WORTH_A_PROCESS
    found = list(read_rewards(path, 1, worth_a_process=0))
    assert found == list(rewards_in(path, 1))
    return len(found)
