"""tools/scripts/bench_schedule.py: the replicas' own code keeps modelled engines full, where it is known to be hard."""

import os
from pathlib import Path

import pytest

from srlm_mega.config.file import load_config
from srlm_mega.tools.planner.engine_model import SchedulerPolicy
from srlm_mega.tools.scripts.bench_schedule import Fleet, Schedule, StageSeconds, fleet_of, main

CONFIG = Path("launch/configs/llama2_70b_64gpu.yaml")
LOAD = 240.0
SHARD_SIZE = load_config(CONFIG).sampler.requests_per_shard


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the files outlive a power cut is not asked here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fleet(prompts: int, policy: SchedulerPolicy = "MAX_UTILIZATION") -> Fleet:
    return fleet_of(load_config(CONFIG), "h100", policy, LOAD, prompts)


def shares(measured: StageSeconds, best: StageSeconds) -> list[float]:
    """Tokens/s as a share of the best, with loading and without."""
    return [measured.speed(seconds) / best.speed(seconds) for seconds in (LOAD, 0.0)]


@pytest.mark.slow
def test_sixteen_replicas_sample_and_judge_as_fast_as_with_a_queue_each() -> None:
    """5,000 prompts with 4 candidates of 3 judgements each; a load of 4 minutes included, and left out."""
    round_of_the_paper = fleet(5000)
    best = round_of_the_paper.one_queue()
    assert min(shares(round_of_the_paper.run(Schedule(SHARD_SIZE)), best)) >= 0.95
    waiting = round_of_the_paper.run(Schedule(256, barrier=True, loads=2))
    assert max(shares(waiting, best)) < 0.75, "a shard at a time leaves engines idle: the check can fail"


@pytest.mark.parametrize("prompts", [250, 500])
def test_few_requests_are_shared_by_all_replicas(prompts: int) -> None:
    """No replica takes what fits into its engine while others have nothing: one engine has room for 128 requests."""
    few = fleet(prompts)
    assert min(shares(few.run(Schedule(SHARD_SIZE)), few.one_queue())) >= 0.95


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"])
def test_every_run_is_the_same_to_the_last_digit(policy: SchedulerPolicy) -> None:
    first, second = (fleet(64, policy).run(Schedule(4)) for _ in range(2))
    assert first == second and first.loads == 1
    assert all(seconds > 0 for seconds in first.seconds)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(CONFIG, prompts=32, shard_size=[2])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("| scheduler | requests | candidates | judgements |")
    assert [line.split(" | ")[1] for line in lines] == 2 * [
        "a queue that never ends", "one queue per replica", "one shard of 256 at a time, a load per stage",
        "shards of 2 in flight",
    ]  # fmt: skip
    assert "100.0% | 100.0% |" in lines[1]
