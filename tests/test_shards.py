"""Shards: a stage that was killed anywhere ends with the same bytes as one that ran through."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from srlm_mega.records import Prompt, read_jsonl
from srlm_mega.sampling.shards import Shard, cut_into_shards, run_shards

REQUESTS = [f"request {number}" for number in range(23)]


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


def answers(shard: Shard[str]) -> Iterator[Prompt]:
    for number, request in enumerate(shard.requests, start=shard.first):
        yield Prompt(f"p{number}", f"{request} with seed {shard.seed}", "test")


def run(output: Path, work: Callable[[Shard[str]], Iterable[Prompt]] = answers, seed: int = 7) -> bytes:
    output.parent.mkdir(exist_ok=True)
    run_shards(cut_into_shards(REQUESTS, 5, seed, 1, "test"), work, output, quiet)
    return output.read_bytes()


def test_requests_are_cut_in_order_with_seeds_of_their_own() -> None:
    shards = cut_into_shards(REQUESTS, 5, 7, 1, "test")
    assert [list(shard.requests) for shard in shards] == [REQUESTS[first : first + 5] for first in range(0, 23, 5)]
    assert [(shard.number, shard.first) for shard in shards] == [(0, 0), (1, 5), (2, 10), (3, 15), (4, 20)]
    assert cut_into_shards(REQUESTS, 5, 7, 1, "test") == shards
    others = [(8, 1, "test"), (7, 2, "test"), (7, 1, "other")]
    seeds = {shard.seed for other in others for shard in cut_into_shards(REQUESTS, 5, *other)}
    assert len(seeds | {shard.seed for shard in shards}) == 20, "run seed, round, purpose and number all count"
    assert cut_into_shards([], 5, 7) == []


def test_the_output_is_whole_in_order_and_alone(tmp_path: Path) -> None:
    run(tmp_path / "out.jsonl")
    records = list(read_jsonl(tmp_path / "out.jsonl", Prompt))
    assert [record.id for record in records] == [f"p{number}" for number in range(23)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_another_seed_gives_another_output(tmp_path: Path) -> None:
    assert run(tmp_path / "a", seed=7) == run(tmp_path / "b", seed=7) != run(tmp_path / "c", seed=8)


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("after_records", [0, 2])
def test_a_stage_that_failed_in_a_shard_repeats_only_the_unfinished(
    tmp_path: Path, failing: int, after_records: int
) -> None:
    whole = run(tmp_path / "whole" / "out.jsonl")
    worked: list[int] = []

    def fails(shard: Shard[str]) -> Iterator[Prompt]:
        for done, record in enumerate(answers(shard)):
            if shard.number == failing and done == after_records:
                raise KeyboardInterrupt
            yield record

    def counts(shard: Shard[str]) -> Iterator[Prompt]:
        worked.append(shard.number)
        yield from answers(shard)

    output = tmp_path / "part" / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(output, fails)
    assert not output.exists()
    finished = sorted(path.name for path in (tmp_path / "part" / "out.jsonl.shards").glob("shard_*"))
    assert finished == [f"shard_{number:05d}.jsonl" for number in range(failing)]
    assert run(output, counts) == whole
    assert worked == list(range(failing, 5))


def test_a_stage_killed_after_the_merge_only_tidies_up(tmp_path: Path) -> None:
    whole = run(tmp_path / "out.jsonl")
    left = tmp_path / "out.jsonl.shards"
    left.mkdir()
    (left / "shard_00004.jsonl").write_text("left over")

    def never(shard: Shard[str]) -> Iterator[Prompt]:
        raise AssertionError("all was done")

    assert run(tmp_path / "out.jsonl", never) == whole
    assert not left.exists()


def test_progress_counts_requests_also_those_of_finished_shards(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    shards = cut_into_shards(REQUESTS, 10, 7)
    run_shards(shards, answers, tmp_path / "out.jsonl", lambda done, total: seen.append((done, total)))
    assert seen == [(0, 23), (10, 23), (20, 23), (23, 23)]


SLOW_STAGE = """
import sys, time
from pathlib import Path
from srlm_mega.records import Prompt
from srlm_mega.sampling.shards import cut_into_shards, run_shards

def work(shard):
    for number, request in enumerate(shard.requests, start=shard.first):
        print(number, flush=True)
        time.sleep(float(sys.argv[2]))
        yield Prompt(f"p{number}", f"{request} with seed {shard.seed}", "test")

requests = [f"request {number}" for number in range(23)]
run_shards(cut_into_shards(requests, 5, 7, 1, "test"), work, Path(sys.argv[1]), lambda done, total: None)
"""


def test_kill_minus_nine_changes_no_byte(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole" / "out.jsonl")
    output = tmp_path / "killed" / "out.jsonl"
    output.parent.mkdir()
    for last_seen in (b"3\n", b"12\n"):
        process = subprocess.Popen([sys.executable, "-c", SLOW_STAGE, str(output), "0.01"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        while process.stdout.readline() != last_seen:
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not output.exists()
    subprocess.run([sys.executable, "-c", SLOW_STAGE, str(output), "0"], check=True, stdout=subprocess.DEVNULL)
    assert output.read_bytes() == whole
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
