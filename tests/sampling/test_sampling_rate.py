"""metrics.jsonl and progress of a sampling stage, by hand."""

import time
from pathlib import Path

import orjson
import pytest

from srlm_mega.sampling.finished_shard import ShardReport
from srlm_mega.sampling.sampling_rate import ShardWatch, shard_metrics, stage_metrics


def report(number: int, seconds: float, requests: int = 10) -> ShardReport:
    return ShardReport(number, number % 2, requests, 1, 400, 1000, 0.5, seconds)


def test_a_shards_rates() -> None:
    line = shard_metrics(report(3, 2.0), devices=4)
    assert (line["requests/s"], line["prompt_tokens/s/GPU"], line["output_tokens/s/GPU"]) == (5, 50, 125)
    assert (line["shard"], line["replica"], line["failed"], line["queue_seconds"]) == (3, 1, 1, 0.5)


def test_a_stages_rates_and_its_slowest_shards() -> None:
    line = stage_metrics([report(number, float(number)) for number in range(1, 102)], 505.0, devices=2)
    assert (line["requests"], line["failed"], line["requests/s"]) == (1010, 101, 2)
    assert line["output_tokens/s/GPU"] == 100
    tail = [line[f"shard_seconds_{which}"] for which in ("p50", "p95", "p99", "max")]
    assert tail == pytest.approx([51, 96, 100, 101])
    assert stage_metrics([report(0, 3.0)], 3.0, 1)["shard_seconds_p99"] == 3.0


def test_time_left_counts_this_attempt_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said: list[tuple[int, int, str]] = []
    watch = ShardWatch(tmp_path / "metrics.jsonl", lambda *state: said.append(state), 100, 1, 2)
    watch.earlier(report(0, 9.0, requests=40))
    now[0] = 20.0
    watch.finished(report(1, 20.0, requests=10))  # 10 requests in 20 s: 50 more take 100 s
    assert said == [(0, 100, ""), (40, 100, ""), (50, 100, "1 min 40 s left, 50 tokens/s")]
    watch.close()
    lines = [orjson.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert [line.get("shard") for line in lines] == [1, None]
    assert lines[1]["requests"] == 10 and lines[1]["output_tokens/s/GPU"] == 25
