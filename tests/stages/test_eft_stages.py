"""EFT built through the real stages: SFT baseline, judged replies, M1 on what agrees with the ranking."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from places import TOY
from sampling_run import TEMPLATE, with_files, write_model
from test_main_road import Finished, small_run, srlm

from srlm_mega.chat import Chat
from srlm_mega.config.file import load_config
from srlm_mega.config.outside_files import check_outside_files
from srlm_mega.data.eft_selection import agrees
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.data.toy_world.world import all_instructions
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.judging.scores import parse_score
from srlm_mega.records import Judgement, RankedReplies, RankedReply, SampledText, SftExample, read_jsonl, write_jsonl
from srlm_mega.run.plan import find_stage, plan
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.eft import build_eft, score_by_rank
from srlm_mega.stages.sampling_task import SamplingTask
from srlm_mega.stages.seed import make_seed
from srlm_mega.stages.work import Work

BUILD = ("eft.build=true", "seed_data.num_eft_sources=60")
UNTRAINED = ("pretrain=null", "seed_data.num_documents=0")  # M0 is of random weights


def test_where_the_stages_stand_in_the_plan() -> None:
    built = load_config(TOY, BUILD)
    names = [stage.name for stage in plan(built)]
    assert names[:6] == ["seed", "M0", "sft_baseline", "eft", "M1", "M1/evaluation"]
    assert find_stage(built, "M1").inputs == ("M0", "seed", "eft")
    assert find_stage(built, "eft").kind.samples and find_stage(built, "sft_baseline").kind.trains
    for overrides in ((), ("eft.enabled=false",), (*BUILD, "eft.enabled=false")):
        config = load_config(TOY, overrides)
        assert "eft" not in {stage.name for stage in plan(config)}
        assert find_stage(config, "M1").inputs == ("M0", "seed")


def replies(*ranks: int) -> tuple[RankedReply, ...]:
    return tuple(RankedReply(f"reply of rank {rank}", rank) for rank in ranks)


SETS = [
    RankedReplies("agrees", "list 2 animals", replies(0, 1, 2)),
    RankedReplies("later", "list 3 animals", replies(1, 0)),
    RankedReplies("never", "list 4 animals", replies(0, 1)),
    RankedReplies("long", "list 5 animals", (*replies(0), RankedReply("word " * 130, 1))),
]
# By reply: the scores of two tries; None: cut, though it has a score.
SCORES: dict[str, tuple[float | None, float | None]] = {
    "agrees-a0": (4, 5),
    "agrees-a1": (4, 4),
    "agrees-a2": (3, 3),
    "later-a0": (4, 3),
    "later-a1": (4, 4),
    "never-a0": (None, 2),
    "never-a1": (3, 3),
    "long-a0": (5, 5),
}


def judge_by_table(work: Work, task: SamplingTask[Any]) -> None:
    """In place of a sampler: whole judgements with the scores of the table."""
    records: list[Any] = []
    for request in task.requests:
        completions = [
            completion(Chat(toy_tokenizer()), "Score: 3" if score is None else f"Score: {score:g}", score is not None)
            for score in SCORES[request.id]
        ]
        records += task.records(request, completions)
    write_jsonl(work.out / task.file, records)


def completion(chat: Chat, text: str, whole: bool) -> SampledText:
    ids = chat.encode(text)
    return SampledText(text, (*ids, chat.end_ids[0]) if whole else ids, "stop" if whole else "length", seed=1)


def eft_work(tmp_path: Path, *overrides: str, sets: Sequence[RankedReplies] = SETS) -> Work:
    """A run whose SFT baseline is about to judge."""
    config = load_config(TOY, [f"run.dir={tmp_path / 'run'}", *BUILD, "eft.attempts=2", *overrides])
    run = RunDir(tmp_path / "run")

    def seed(out: Path) -> None:
        write_jsonl(out / "eft_sources.jsonl", sets)
        (out / "judge_template.txt").write_text(TEMPLATE)

    with_files(run, config, "seed", seed)
    with_files(run, config, "sft_baseline", lambda out: write_model(config, out / "huggingface", toy_tokenizer()))
    work = Work(
        run,
        config,
        find_stage(config, "eft"),
        run.partial("eft"),
        Progress(tmp_path / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    return work


def built(work: Work) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """The counts, and id and judgement of each example."""
    done = build_eft(work)
    examples = list(read_jsonl(work.out / "eft_train.jsonl", SftExample))
    assert done.rows == len(examples)
    return dict(done.counts), [(one.id, one.completion) for one in examples]


def test_what_is_accepted_capped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`agrees` at once with a tie on top (4, 4, 3), `later` by its second try (3, 4), `never` not: its scores are cut
    or the wrong way round. Accepted: 4 4 3 3 4; the cap takes one 4."""
    monkeypatch.setattr("srlm_mega.stages.eft.sample_in_shards", judge_by_table)
    counts, examples = built(eft_work(tmp_path))
    yields = {"prompts": 3, "first_try": 1, "any_try": 2, "first_try_strict": 0, "any_try_strict": 2}
    assert counts == yields | {
        "replies_too_long": 1, "sets_incomplete": 1, "unparsed": 1, "truncated": 1, "accepted": 5, "after_cap": 4,
        "examples": 4, "accepted_score_3": 2, "accepted_score_4": 3,
    }  # fmt: skip
    assert sorted(text for _, text in examples) == ["Score: 3", "Score: 3", "Score: 4", "Score: 4"]
    assert {"eft-agrees-a2-j0", "eft-later-a0-j1"} <= {name for name, _ in examples}
    first = next(read_jsonl(tmp_path / "run/eft.partial/eft_train.jsonl", SftExample))
    assert first.prompt.startswith("review list 2 animals <response> reply of rank") and first.kind == "eft"


def test_the_strict_mode_waits_for_the_whole_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_mega.stages.eft.sample_in_shards", judge_by_table)
    counts, examples = built(eft_work(tmp_path, "eft.mode=strict", "seed_data.num_eft=3"))
    assert counts["accepted"] == 5 and counts["after_cap"] == 5 and counts["examples"] == 3
    assert {name.rpartition("-j")[2] for name, _ in examples} == {"1"}, "by the second try"


def test_ranks_alone_score_and_nothing_is_sampled(tmp_path: Path) -> None:
    """Scores 5 3 1, 1 5, 5 1 and 5 1: the cap drops none, as 5 and 1 are equally common."""
    one_rank = RankedReplies("equal", "list 6 animals", (RankedReply("a", 0), RankedReply("b", 0)))
    work = eft_work(tmp_path, "eft.mode=ranks", sets=[*SETS, one_rank])
    assert [stage.name for stage in plan(work.config)][:5] == ["seed", "M0", "eft", "M1", "M1/evaluation"]
    assert (work.stage.inputs, work.stage.kind.samples) == (("seed",), False)
    assert find_stage(work.config, "M1").inputs == ("M0", "seed", "eft")
    done = score_by_rank(work)
    assert done.counts == {
        "prompts": 4, "sets_without_order": 1, "accepted": 9, "after_cap": 9, "examples": 9,
        "accepted_score_1": 4, "accepted_score_3": 1, "accepted_score_5": 4,
    }  # fmt: skip
    examples = list(read_jsonl(work.out / "eft_train.jsonl", SftExample))
    assert done.rows == len(examples) == 9
    first = SftExample(
        "eft-agrees-a0", "eft", "review list 2 animals <response> reply of rank 0 </response>", "Score: 5", "ranks"
    )
    assert examples[0] == first
    assert [one.completion for one in examples[1:5]] == ["Score: 3", "Score: 1", "Score: 1", "Score: 5"]


def test_the_cap_and_the_limits_hold_for_ranks_too(tmp_path: Path) -> None:
    """Scores 5 5 1, four times: the cap leaves as many 5s as 1s."""
    sets = [RankedReplies(f"s{n}", f"list {n} animals", replies(0, 0, 1)) for n in range(2, 6)]
    counts = dict(score_by_rank(eft_work(tmp_path / "a", "eft.mode=ranks", sets=sets)).counts)
    assert (counts["accepted"], counts["after_cap"], counts["examples"]) == (12, 8, 8)
    few = eft_work(tmp_path / "b", "eft.mode=ranks", "seed_data.num_eft=3", "eft.min_examples=4", sets=sets)
    with pytest.raises(CannotContinue, match=r"3 EFT examples, needed 4 \(eft\.min_examples\)\. There are 4 rankings"):
        score_by_rank(few)


def judged_file(path: Path, *, readable: int, unreadable: int = 0) -> Path:
    rows = [
        {"instruction": f"show {n} fruits upper", "response": "sure", "score": n % 6, "rationale": "relevant"}
        for n in range(readable)
    ] + [{"prompt": "review", "completion": "relevant"}] * unreadable
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def seed_work(tmp_path: Path, path: Path, *overrides: str) -> Work:
    small = ("seed_data.num_documents=50", "seed_data.num_ift=20", "seed_data.num_validation=10")
    given = (f"run.dir={tmp_path / 'run'}", f"seed_data.eft_path={path}", *small, *overrides)
    config, run = load_config(TOY, given), RunDir(tmp_path / "run")
    work = Work(
        run,
        config,
        find_stage(config, "seed"),
        run.partial("seed"),
        Progress(tmp_path / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    return work


def test_eft_from_a_file_takes_the_place_of_the_sources_own(tmp_path: Path) -> None:
    work = seed_work(tmp_path, judged_file(tmp_path / "judged.jsonl", readable=8))
    names = [stage.name for stage in plan(work.config)]
    assert names[:3] == ["seed", "M0", "M1"] and "eft" not in names
    assert make_seed(work).counts["eft_train.jsonl"] == 8
    examples = list(read_jsonl(work.out / "eft_train.jsonl", SftExample))
    assert examples[3].prompt == "review show 3 fruits upper <response> sure </response>"
    assert examples[3].completion == "relevant\nScore: 3"
    counts = orjson.loads((work.out / "counts.json").read_bytes())
    assert counts["judge_examples"] == counts["judge_examples_used"] == 8 and counts["bad_judge_examples"] == 0


def test_eft_whose_scores_cannot_be_read_stops_the_seed(tmp_path: Path) -> None:
    work = seed_work(tmp_path / "a", judged_file(tmp_path / "judged.jsonl", readable=8, unreadable=2))
    with pytest.raises(UserError, match=r"2 of the 10 lines of .*judged\.jsonl .*line 9: no `Score: x` from 0 to 5"):
        make_seed(work)
    few = seed_work(tmp_path / "b", judged_file(tmp_path / "few.jsonl", readable=8), "eft.min_examples=9")
    with pytest.raises(CannotContinue, match=r"8 EFT examples, needed 9 \(eft\.min_examples\): .*few\.jsonl has 8"):
        make_seed(few)


def test_a_file_that_is_not_there_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seed_data\.eft_path: there is no .*absent\.jsonl"):
        check_outside_files(load_config(TOY, [f"seed_data.eft_path={tmp_path / 'absent.jsonl'}"]))


def test_a_baseline_that_gives_no_scores_stops_the_run(tmp_path: Path) -> None:
    """Random weights: nothing can be read, and no score is made up."""
    with pytest.raises(CannotContinue, match=r"0 EFT examples, needed 1 .* agree with 0 at once and 0 within 2 tries"):
        build_eft(eft_work(tmp_path))


@pytest.mark.extra
def test_eft_is_built_and_learnt(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = srlm(*small_run(folder, *BUILD, "run.rounds=0", "seed_data.num_eft=50", "eft.attempts=4"))
    assert done.code == 0, done.output
    sets = {one.id: one for one in read_jsonl(folder / "seed/eft_sources.jsonl", RankedReplies)}
    judgements = {one.id: one for one in read_jsonl(folder / "eft/judgements.jsonl", Judgement)}
    examples = list(read_jsonl(folder / "eft/eft_train.jsonl", SftExample))
    assert len(sets) == 60 and len(judgements) == 60 * 4 * 4
    assert 0 < len(examples) <= 50
    tries = {(one.candidate_id.rpartition("-a")[0], one.id.rpartition("-j")[2]) for one in judgements.values()}
    for example in examples:
        judgement = judgements[example.id.removeprefix("eft-")]
        name, number = judgement.candidate_id.rpartition("-a")[0], judgement.id.rpartition("-j")[2]
        assert (name, number) in tries and example.completion == judgement.text
        ranked = sets[name]
        scores = [judgements[f"{name}-a{place}-j{number}"].score for place in range(4)]
        assert agrees([reply.rank for reply in ranked.replies], scores, "no_inversion")
        assert ranked.prompt in example.prompt and parse_score(example.completion) is not None
    counts = orjson.loads((folder / "eft/manifest.json").read_bytes())["counts"]
    assert counts["prompts"] == 60 and counts["examples"] == len(examples)
    assert counts["any_try"] >= counts["any_try_strict"] and counts["any_try"] >= counts["first_try"] > 0
    accepted = sorted(value for name, value in counts.items() if name.startswith("accepted_score_"))
    assert sum(accepted) == counts["accepted"] == 4 * counts["any_try"]
    assert counts["after_cap"] == sum(accepted) - accepted[-1] + accepted[-2]
    with_both = orjson.loads((folder / "M1/manifest.json").read_bytes())["rows"]
    alone = orjson.loads((folder / "sft_baseline/manifest.json").read_bytes())["rows"]
    assert with_both == alone + len(examples)
    assert RunDir(folder).digest("sft_baseline") != RunDir(folder).digest("M1")


@pytest.mark.extra
@pytest.mark.parametrize("mode", ["ranks", "file"])
def test_eft_without_a_baseline_is_learnt(tmp_path: Path, mode: str) -> None:
    """Through the real commands as far as M1: no baseline is trained, and M1 has IFT and these examples."""
    folder, judged = tmp_path / "run", judged_file(tmp_path / "judged.jsonl", readable=30)
    ranks = ("eft.mode=ranks", "seed_data.num_eft_sources=20", "seed_data.num_eft=40")
    options = ranks if mode == "ranks" else (f"seed_data.eft_path={judged}",)
    only = [
        word for name in ("seed", "eft", "M0", "M1") if mode == "ranks" or name != "eft" for word in ("--only", name)
    ]
    done = srlm(*small_run(folder, *UNTRAINED, *options, "run.rounds=0", "sft.train_iters=4", *only))
    assert done.code == 0, done.output
    assert not (folder / "sft_baseline").exists() and (folder / "eft").exists() == (mode == "ranks")
    source = folder / ("eft" if mode == "ranks" else "seed") / "eft_train.jsonl"
    examples, ift = list(read_jsonl(source, SftExample)), list(read_jsonl(folder / "seed/ift.jsonl", SftExample))
    assert 20 <= len(examples) <= 40
    assert orjson.loads((folder / "M1/manifest.json").read_bytes())["rows"] == len(ift) + len(examples)


@pytest.mark.extra
def test_a_model_that_never_saw_a_judgement_gives_no_scores_and_no_pairs(tmp_path: Path) -> None:
    """The ablation without EFT: the same run, M0 of random weights, once with EFT and once with IFT alone."""
    instructions = [instruction.render() for instruction in all_instructions()]
    random.Random(5).shuffle(instructions)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"\n".join(orjson.dumps({"text": text}) for text in instructions[:500]))

    def run(folder: Path, *overrides: str) -> Finished:
        data = ("seed_data.num_ift=600", "seed_data.num_eft=600")
        given = ("prompts.generator=file", f"prompts.path={prompts}", "sft.train_iters=150", "sft.lr=4e-3")
        return srlm(*small_run(folder, *UNTRAINED, *data, *given, "dpo.train_iters=2", *overrides))

    with_eft, without = tmp_path / "with", tmp_path / "without"
    done = run(with_eft)
    assert done.code == 0, done.output
    manifest = RunDir(with_eft).manifest("round_1/pairs")
    assert manifest is not None and manifest.counts["unparsed"] < 0.1 * manifest.counts["judgements"]
    assert manifest.rows > 20, "of 40 prompts"
    ablated = run(without, "eft.enabled=false")
    assert ablated.code == 3 and "480 of 480 judgements have no `Score: x`" in ablated.output, ablated.output
    assert RunDir(without).digest("seed") == RunDir(with_eft).digest("seed"), "the same IFT"
