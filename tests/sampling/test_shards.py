"""Shards: a stage that was killed anywhere ends with the same bytes as one that ran through, whoever worked on it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from places import TOY

from srlm_mega.config.file import load_config
from srlm_mega.errors import CannotContinue
from srlm_mega.records import FailedRequest, Prompt, read_jsonl
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.finished_shard import ShardReport
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.sampling.shards import (
    Answered,
    Shard,
    ShardFiles,
    cut_into_shards,
    cut_one_call,
    run_shards,
)
from srlm_mega.stages.sharded import shard_files
from srlm_mega.stages.work import Work as StageWork

REQUESTS = [f"request {number}" for number in range(23)]
Work = Callable[[Shard[str]], Answered]


def quiet(report: ShardReport) -> None:
    """Nobody watches."""


def answers(shard: Shard[str]) -> Answered:
    return Answered(
        [
            Prompt(f"p{number}", f"{request} with seed {shard.seed}", "test")
            for number, request in enumerate(shard.requests, start=shard.first)
        ]
    )


def files_of(output: Path, seed: int = 7) -> ShardFiles[str]:
    return ShardFiles(cut_into_shards(REQUESTS, 5, seed, 1, "test"), output)


def run(output: Path, work: Work = answers, seed: int = 7) -> bytes:
    output.parent.mkdir(exist_ok=True)
    run_shards(files_of(output, seed), work, quiet, quiet)
    return output.read_bytes()


def finish(files: ShardFiles[str], shard: Shard[str], work: Work, replica: int = 0) -> None:
    answered = work(shard)
    files.finish(shard, answered, answered.report(shard, replica, 0.0, 1.0))


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
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", ".out.jsonl.seal"}


def test_another_seed_gives_another_output(tmp_path: Path) -> None:
    assert run(tmp_path / "a", seed=7) == run(tmp_path / "b", seed=7) != run(tmp_path / "c", seed=8)


@pytest.mark.parametrize("failing", range(5))
def test_a_stage_that_failed_in_a_shard_repeats_only_the_unfinished(tmp_path: Path, failing: int) -> None:
    whole = run(tmp_path / "whole" / "out.jsonl")
    worked: list[int] = []

    def fails(shard: Shard[str]) -> Answered:
        if shard.number == failing:
            raise KeyboardInterrupt
        return answers(shard)

    def counts(shard: Shard[str]) -> Answered:
        worked.append(shard.number)
        return answers(shard)

    output = tmp_path / "part" / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(output, fails)
    assert not output.exists()
    finished = sorted(path.name for path in (tmp_path / "part" / "out.jsonl.shards").glob("shard_*.jsonl"))
    assert finished == [f"shard_{number:05d}.jsonl" for number in range(failing)]
    assert run(output, counts) == whole
    assert worked == list(range(failing, 5))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut in a line": lambda content: content[:-7],
    "cut by lines": lambda content: b"\n".join(content.split(b"\n")[:2]) + b"\n",
    "without its last line": lambda content: content[: content.rindex(b"\n", 0, -1) + 1],
    "without a record": lambda content: content[content.index(b"\n") + 1 :],
    "a letter changed": lambda content: content.replace(b"request 6", b"request 9"),
    "a failure added": lambda content: content.replace(
        b'"failed":[]', b'"failed":[{"id":"p","error":"","attempts":1}]'
    ),
    "another count": lambda content: content.replace(b'"requests":5', b'"requests":4'),
    "a list": lambda content: b"[]\n",
    "without its line's end": lambda content: content[:-1],
    "another shard's": lambda content: content.replace(b'"shard":1', b'"shard":2'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_done_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole" / "out.jsonl")
    files, again = files_of(tmp_path / "out.jsonl"), list[int]()
    files.prepare()
    for shard in files.shards[:3]:
        finish(files, shard, answers)
    path = files.folder / "shard_00001.jsonl"
    damaged = DAMAGES[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)

    def counts(shard: Shard[str]) -> Answered:
        again.append(shard.number)
        return answers(shard)

    assert run(tmp_path / "out.jsonl", counts) == whole
    assert again == [1, 3, 4]
    assert f"{path}" in capsys.readouterr().out


def test_a_shard_of_other_requests_is_done_again(tmp_path: Path) -> None:
    """Whole, but cut in another size or of another number: found by its report."""
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    finish(files, files.shards[0], answers)
    content = (files.folder / "shard_00000.jsonl").read_bytes()
    for number in (1, 4):
        (files.folder / f"shard_{number:05d}.jsonl").write_bytes(content)
    files.prepare()
    assert [shard.number for shard in files.finished()] == [0]


@pytest.mark.parametrize("count", [4, 6])
def test_a_shard_of_another_number_of_records_is_done_again(tmp_path: Path, count: int) -> None:
    """Although its hash is right: a judge that forgot an answer, or gave one twice."""
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    for shard in files.shards:
        finish(files, shard, lambda one: Answered((answers(one).records * 2)[:count]))
    with pytest.raises(CannotContinue, match=rf"shard_00000\.jsonl has {count} records and 0 failures of 5 requests"):
        files.merge()
    assert run(tmp_path / "out.jsonl") == run(tmp_path / "whole" / "out.jsonl")


def test_a_shard_knows_the_model_that_answers_it(tmp_path: Path) -> None:
    """One that another model answered, in the same folder, is asked again."""
    first, second = (ShardFiles(cut_one_call(REQUESTS, 5, 7, name), tmp_path / "out.jsonl") for name in ("a", "b"))
    first.prepare()
    finish(first, first.shards[0], answers)
    assert len(first.prepare()) == 1 and second.prepare() == []
    assert first.shards[0].asked != cut_one_call(REQUESTS, 5, 7)[0].asked


def test_damage_while_the_stage_works_ends_it_before_the_merge(tmp_path: Path) -> None:
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    for shard in files.shards:
        finish(files, shard, answers)
    (files.folder / "shard_00003.jsonl").write_bytes(b"")
    with pytest.raises(CannotContinue, match=r"shard_00003\.jsonl is cut or damaged.* The same command does the shard"):
        files.merge()
    assert not files.output.exists()


def never(shard: Shard[str]) -> Answered:
    raise AssertionError("all was done")


def test_a_stage_killed_after_the_merge_only_tidies_up(tmp_path: Path) -> None:
    whole = run(tmp_path / "out.jsonl")
    left = tmp_path / "out.jsonl.shards"
    left.mkdir()
    (left / "shard_00004.jsonl").write_text("left over")
    assert run(tmp_path / "out.jsonl", never) == whole
    assert not left.exists()


@pytest.mark.parametrize("name", ["out.jsonl", "failed.jsonl"])
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-20], lambda content: None])
def test_an_output_that_was_damaged_after_the_merge_is_made_again(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shards are gone, or not yet: their files are merged again."""
    whole, path = run(tmp_path / "out.jsonl", first_fails), tmp_path / name
    content = path.read_bytes()
    for shards_are_there in (False, True):
        wrong = damage(content)
        path.unlink() if wrong is None else path.write_bytes(wrong)
        if shards_are_there:
            files = files_of(tmp_path / "out.jsonl")
            files.prepare()
            for shard in files.shards:
                finish(files, shard, first_fails)
        assert run(tmp_path / "out.jsonl", never if shards_are_there else first_fails) == whole
        assert path.read_bytes() == content and not (tmp_path / "out.jsonl.shards").exists()
    said = f"{tmp_path / 'out.jsonl'} is not as it was written" in capsys.readouterr().out
    assert said or (name == "out.jsonl" and damage(content) is None)


def test_failures_lie_beside_the_records(tmp_path: Path) -> None:
    def fails(shard: Shard[str]) -> Answered:
        whole = answers(shard)
        if shard.number not in (1, 3):
            return whole
        return Answered(whole.records[1:], [FailedRequest(f"p{shard.first}", "broken", 3)])

    run(tmp_path / "out.jsonl", fails)
    assert len(list(read_jsonl(tmp_path / "out.jsonl", Prompt))) == 21
    assert [one.id for one in read_jsonl(tmp_path / "failed.jsonl", FailedRequest)] == ["p5", "p15"]


def first_fails(shard: Shard[str]) -> Answered:
    """All but the first request are answered."""
    return Answered(answers(shard).records[1:], [FailedRequest(f"p{shard.first}", "broken", 3)])


def test_failures_of_an_earlier_attempt_are_forgotten_once_all_is_answered(tmp_path: Path) -> None:
    run(tmp_path / "out.jsonl", first_fails)
    assert (tmp_path / "failed.jsonl").exists()
    (tmp_path / "out.jsonl").unlink()
    run(tmp_path / "out.jsonl")
    assert not (tmp_path / "failed.jsonl").exists()


def test_failures_of_a_shard_that_is_done_again_are_forgotten(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    files = files_of(output)
    files.prepare()
    for shard in files.shards:
        finish(files, shard, first_fails)
    (files.folder / "shard_00002.jsonl").unlink()
    run(output)
    assert [one.id for one in read_jsonl(tmp_path / "failed.jsonl", FailedRequest)] == ["p0", "p5", "p15", "p20"]


def test_failures_count_together_whichever_process_had_them(tmp_path: Path) -> None:
    """Two processes with two failures each, where three are allowed: each of them alone may go on."""
    output, asked = tmp_path / "out.jsonl", list[int]()

    def files() -> ShardFiles[str]:
        return ShardFiles(cut_into_shards(REQUESTS, 5, 7, 1, "test"), output, allowed=3)

    def counts(shard: Shard[str]) -> Answered:
        asked.append(shard.number)
        return answers(shard)

    files().prepare()
    for shard in files().shards[:4]:
        finish(files(), shard, first_fails, shard.number // 2)
    with pytest.raises(
        CannotContinue,
        match=r"max_failed_share allows 3\. The last is p15: broken\. .* resumes",
    ):
        run_shards(files(), answers, quiet, quiet)
    assert not output.exists()
    run_shards(files(), counts, quiet, quiet)
    assert asked == [0, 1, 2, 3], "the ones with failures, and no other"
    assert output.read_bytes() == run(tmp_path / "whole" / "out.jsonl") and not (tmp_path / "failed.jsonl").exists()


def test_a_stages_shards_allow_the_configured_share_of_its_requests(tmp_path: Path) -> None:
    config = load_config(TOY, [f"run.dir={tmp_path}", "sampler.max_failed_share=0.1"])
    stage, progress = find_stage(config, "round_1/candidates"), Progress(tmp_path / "progress.json")
    work = StageWork(RunDir(tmp_path), config, stage, tmp_path, progress, Samplers(config, tmp_path / "replicas"))
    assert shard_files(work, REQUESTS, "out.jsonl").allowed == 2


def test_as_many_failures_as_are_allowed_stop_nothing(tmp_path: Path) -> None:
    shards = cut_into_shards(REQUESTS, 5, 7, 1, "test")
    run_shards(ShardFiles(shards, tmp_path / "out.jsonl", allowed=5), first_fails, quiet, quiet)
    assert len(list(read_jsonl(tmp_path / "failed.jsonl", FailedRequest))) == 5


def test_reports_of_this_attempt_and_of_the_one_before(tmp_path: Path) -> None:
    earlier: list[int] = []
    now: list[int] = []

    def fails(shard: Shard[str]) -> Answered:
        if shard.number == 2:
            raise KeyboardInterrupt
        return answers(shard)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.jsonl", fails)
    run_shards(
        files_of(tmp_path / "out.jsonl"), answers, lambda r: earlier.append(r.shard), lambda r: now.append(r.shard)
    )
    assert (earlier, now) == ([0, 1], [2, 3, 4])


def test_a_lease_is_one_replicas_until_it_is_too_old_or_given_back(tmp_path: Path) -> None:
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    shard = files.shards[0]
    assert files.lease(shard, 0, 60) and not files.lease(shard, 1, 60)
    assert files.lease(files.shards[1], 0, 60)
    path = files.folder / "shard_00000.lease"
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    assert not files.lease(shard, 0, 60), "it is the slow one itself that asks"
    assert files.lease(shard, 1, 60) and not files.lease(shard, 2, 60), "taken over, and young again"
    files.release(0)
    assert not files.lease(shard, 2, 60) and files.lease(files.shards[1], 2, 60)


def test_a_shard_that_was_finished_since_one_looked_is_not_taken_again(tmp_path: Path) -> None:
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    first = files.missing()[0]
    assert files.lease(first, 1, 60)
    finish(files, first, answers, replica=1)
    assert not files.lease(first, 0, 60)
    assert not list(files.folder.glob("*.lease"))


def test_coming_late_does_no_harm(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole" / "out.jsonl")
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    for replica in (0, 9):
        for shard in files.shards if replica == 0 else files.shards[:1]:
            finish(files, shard, answers, replica)
    files.merge()
    assert files.output.read_bytes() == whole


def test_free_shards_come_before_those_of_others(tmp_path: Path) -> None:
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    assert files.lease(files.shards[0], 9, 1e9)
    taken = [files.lease_next(0, 60) for _ in range(5)]
    assert [None if shard is None else shard.number for shard in taken] == [1, 2, 3, 4, None]
    hour_ago = time.time() - 3600
    os.utime(files.folder / "shard_00000.lease", (hour_ago, hour_ago))
    late = files.lease_next(0, 60)
    assert late is not None and late.number == 0, "taken over"


def test_a_replica_that_holds_its_share_leaves_the_rest_to_others(tmp_path: Path) -> None:
    """Of five shards two replicas have three at most; of the last two, one each."""
    files = files_of(tmp_path / "out.jsonl")
    files.prepare()
    taken = [files.lease_next(0, 60, held, replicas=2) for held in range(4)]
    assert [None if shard is None else shard.number for shard in taken] == [0, 1, 2, None]
    for shard in files.shards[:3]:
        finish(files, shard, answers)
    one = files.lease_next(0, 60, 0, replicas=2)
    assert one is not None and files.lease_next(0, 60, 1, replicas=2) is None
    assert files.lease_next(1, 60, 0, replicas=2) == files.shards[4]


def test_who_looks_for_a_shard_when_all_are_merged_finds_none(tmp_path: Path) -> None:
    """Also a replica that is late with a shard that another has done."""
    files, late = files_of(tmp_path / "out.jsonl"), files_of(tmp_path / "out.jsonl")
    files.prepare()
    for shard in files.shards:
        finish(files, shard, answers)
    files.merge()
    files.tidy()
    assert late.missing() == [] and late.finished() == [] and late.lease_next(1, 0) is None
    finish(late, late.shards[0], answers, replica=1)
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", ".out.jsonl.seal"}


def test_the_folder_goes_while_a_replica_takes_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its draft of a lease and the lease: neither of the two fails, and nothing is left."""
    files, link = files_of(tmp_path / "out.jsonl"), os.link
    files.prepare()

    def tidied_before(draft: Path, path: Path) -> None:
        files_of(tmp_path / "out.jsonl").tidy()
        link(draft, path)

    monkeypatch.setattr(os, "link", tidied_before)
    assert files.lease_next(1, 0) is None
    assert list(tmp_path.iterdir()) == []


SLOW_STAGE = """
import sys, time
from pathlib import Path
from srlm_mega.records import Prompt
from srlm_mega.sampling.shards import Answered, ShardFiles, cut_into_shards, run_shards

def work(shard):
    records = []
    for number, request in enumerate(shard.requests, start=shard.first):
        print(number, flush=True)
        time.sleep(float(sys.argv[2]))
        records.append(Prompt(f"p{number}", f"{request} with seed {shard.seed}", "test"))
    return Answered(records)

requests = [f"request {number}" for number in range(23)]
files = ShardFiles(cut_into_shards(requests, 5, 7, 1, "test"), Path(sys.argv[1]))
run_shards(files, work, lambda report: None, lambda report: None)
"""


@pytest.mark.timing
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
    assert {path.name for path in output.parent.iterdir()} == {"out.jsonl", ".out.jsonl.seal"}
