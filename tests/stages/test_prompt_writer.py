"""Who writes the prompts, and what no new prompt may repeat."""

from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT
from sampling_run import with_files, write_model

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.records import Prompt, PromptDraft, RankedReplies, RankedReply, SftExample, read_jsonl, write_jsonl
from srlm_mega.run.plan import find_stage, plan
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import seal_of
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.base import take_writer
from srlm_mega.stages.prompts import seed_prompts, write_prompts
from srlm_mega.stages.work import Work

TOY = ROOT / "launch/configs/toy_cpu.yaml"


def toy(*overrides: str) -> Config:
    return load_config(TOY, overrides)


def test_the_writer_is_an_input_of_every_round() -> None:
    assert find_stage(toy(), "round_2/prompts").inputs == ("seed", "M0", "round_1/prompts")
    assert find_stage(toy("prompts.writer=current"), "round_2/prompts").inputs == ("seed", "M2", "round_1/prompts")
    outside = toy("prompts.writer=models/chat")
    assert find_stage(outside, "round_2/prompts").inputs == ("seed", "M0", "prompt_writer", "round_1/prompts")
    names = [stage.name for stage in plan(outside)]
    assert names.count("prompt_writer") == 1 and names.index("prompt_writer") < names.index("round_1/prompts")
    for without in ("prompts.writer=base", "prompts.writer=current", "run.rounds=0"):
        assert "prompt_writer" not in [stage.name for stage in plan(toy("prompts.writer=models/chat", without))]


def write_seed(out: Path) -> None:
    """Seed data with one prompt in each set."""
    ranked = (RankedReply("a", 0), RankedReply("b", 1))
    write_jsonl(out / "ift.jsonl", [SftExample(f"i{n}", "ift", f"list {n} animals", "x", "test") for n in range(8)])
    write_jsonl(out / "validation.jsonl", [Prompt("v", "validation prompt", "test")])
    write_jsonl(out / "test.jsonl", [Prompt("t", "test prompt", "test")])
    write_jsonl(out / "eft_eval.jsonl", [RankedReplies("e", "eval prompt", ranked)])
    write_jsonl(out / "eft_sources.jsonl", [RankedReplies("s", "source prompt", ranked)])


def begin(tmp_path: Path, stage: str, *overrides: str) -> Work:
    """A run that is about to make a stage; M0 and a model from outside have random weights of their own."""
    config = toy(f"run.dir={tmp_path / 'run'}", *overrides)
    run = RunDir(tmp_path / "run")
    with_files(run, config, "seed", write_seed)
    with_files(run, config, "M0", lambda out: write_model(config, out / "huggingface", toy_tokenizer()))
    work = Work(
        run,
        config,
        find_stage(config, stage),
        run.partial(stage),
        Progress(tmp_path / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    return work


def test_a_model_from_outside_writes(tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    write_model(toy("model.num_layers=4"), folder, toy_tokenizer())
    sizes = ("prompts.per_round=3", "prompts.min_words=1", "prompts.max_requests=192")
    work = begin(tmp_path, "prompt_writer", f"prompts.writer={folder}", *sizes)
    assert take_writer(work).rows == 0 and (work.out / "huggingface").resolve() == folder
    with_files(work.run, work.config, "prompt_writer", lambda out: (out / "huggingface").symlink_to(folder))
    stage = find_stage(work.config, "round_1/prompts")
    writing = replace(work, stage=stage, out=work.run.partial(stage.name))
    writing.out.mkdir(parents=True)
    assert write_prompts(writing).rows == 3
    prompts = list(read_jsonl(writing.out / "prompts.jsonl", Prompt))
    assert len({prompt.text for prompt in prompts}) == 3
    (draft, *_) = (writing.out / "drafts_00000.jsonl").read_text().splitlines()
    assert work.run.digest("prompt_writer") in draft and work.run.digest("M0") not in draft


def test_a_writer_with_fewer_positions_is_asked_what_it_can_answer(tmp_path: Path) -> None:
    """48 positions where the run's models have 128: of requests of 26 to 71 tokens some leave room for 8 more."""
    folder = tmp_path / "chat"
    write_model(toy(), folder, toy_tokenizer())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"max_position_embeddings": 128', '"max_position_embeddings": 48')
    )
    sizes = ("prompts.per_round=3", "prompts.min_words=1", "prompts.max_requests=192", "prompts.max_new_tokens=8")
    work = begin(tmp_path, "round_1/prompts", f"prompts.writer={folder}", *sizes)
    with_files(work.run, work.config, "prompt_writer", lambda out: (out / "huggingface").symlink_to(folder))
    shown = [SftExample(f"i{n}", "ift", "list 3 animals " * n, "x", "test") for n in range(1, 9)]
    write_jsonl(work.run.output("seed") / "ift.jsonl", shown)
    assert write_prompts(work).rows == 3
    drafts = list(read_jsonl(work.out / "drafts_00000.jsonl", PromptDraft))
    lengths = [len(Chat.from_folder(folder).running_text(draft.request)) for draft in drafts]
    assert 0 < len(drafts) < 64 and max(lengths) <= 40


def test_a_writer_that_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.writer .*nothing is not a Hugging Face model folder"):
        take_writer(begin(tmp_path, "prompt_writer", f"prompts.writer={tmp_path}/nothing"))


def test_no_prompt_repeats_seed_data(tmp_path: Path) -> None:
    """From a file: equal to one of any set, or nearly; shared beginnings alone do not matter."""
    work = begin(
        tmp_path, "round_1/prompts", "prompts.generator=file", f"prompts.path={tmp_path}/gone.jsonl",
        "prompts.rouge_l_max=0.7", "prompts.per_round=2",
    )  # fmt: skip
    known = ["list 3 animals", "validation  prompt", "Test prompt", "eval prompt.", "source prompt", "list 4 animals!"]
    assert len(seed_prompts(work)) == 12
    fresh = ["list 5 colors upper open okay", "list 2 tools lower close bye"]
    texts = [Prompt(f"p{number}", text, "test") for number, text in enumerate([*known, *fresh, fresh[0]])]
    write_jsonl(work.run.output("seed") / "prompts.jsonl", texts)
    done = write_prompts(work)
    assert sorted(prompt.text for prompt in read_jsonl(work.out / "prompts.jsonl", Prompt)) == sorted(fresh)
    assert done.counts == {"repeated": 1, "no_room": 0, "in_seed_data": 6}


class Recorded(Progress):
    """A progress file that remembers every state."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.notes: list[str] = []

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        self.notes.append(note)


@pytest.mark.parametrize(("limit", "waves"), [(10, [10]), (64, [64]), (70, [64, 6])])
def test_no_more_requests_than_max_requests(tmp_path: Path, limit: int, waves: list[int]) -> None:
    work = begin(tmp_path, "round_1/prompts", f"prompts.max_requests={limit}", "prompts.max_new_tokens=8")
    with pytest.raises(CannotContinue, match=rf"^{limit} requests \(prompts\.max_requests\) gave"):
        write_prompts(work)
    files = sorted(work.out.glob("drafts_*.jsonl"))
    assert [len(file.read_bytes().splitlines()) for file in files] == waves


def test_a_shorter_wave_is_the_beginning_of_a_whole_one(tmp_path: Path) -> None:
    """The same requests with the same draws, so the seed alone decides them."""
    drafts = []
    for limit in (10, 64):
        name = f"of {limit}"
        work = begin(tmp_path / name, "round_1/prompts", f"prompts.max_requests={limit}", "prompts.max_new_tokens=8")
        with pytest.raises(CannotContinue):
            write_prompts(work)
        drafts.append(list(read_jsonl(work.out / "drafts_00000.jsonl", PromptDraft)))
    few, many = drafts
    assert [(one.request, one.token_ids) for one in few] == [(one.request, one.token_ids) for one in many[:10]]


@pytest.mark.parametrize("damage", ["emptied", "cut", "edited", "of an earlier wave", "of fewer requests"])
def test_damaged_drafts_are_sampled_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    work = begin(tmp_path, "round_1/prompts", "prompts.max_requests=66", "prompts.max_new_tokens=8")
    with pytest.raises(CannotContinue):
        write_prompts(work)
    first, second = (work.out / f"drafts_{wave:05d}.jsonl" for wave in (0, 1))
    whole = [path.read_bytes() for path in (first, second)]
    capsys.readouterr()
    match damage:
        case "emptied":
            second.write_bytes(b"")
        case "cut":
            second.write_bytes(whole[1].splitlines(keepends=True)[0])
        case "edited":
            second.write_bytes(whole[1].replace(b'"text":"', b'"text":"x'))
        case "of an earlier wave":
            for file in (second, seal_of(second)):
                file.write_bytes(file.with_name(file.name.replace("00001", "00000")).read_bytes())
        case _:
            fewer = work.config.prompts.model_copy(update={"max_requests": 65})
            work = replace(work, config=work.config.model_copy(update={"prompts": fewer}))
    with pytest.raises(CannotContinue, match=r"^6[56] requests"):
        write_prompts(work)
    wanted = whole if damage != "of fewer requests" else [whole[0], whole[1].splitlines(keepends=True)[0]]
    assert [path.read_bytes() for path in (first, second)] == wanted
    said = capsys.readouterr().out
    assert f"{second} is not as it was written" in said and str(first) not in said


def test_progress_is_shown_within_a_wave(tmp_path: Path) -> None:
    progress = Recorded(tmp_path / "recorded.json")
    sizes = ("prompts.max_requests=10", "prompts.max_new_tokens=30", "sampler.batch_size=4")
    work = replace(begin(tmp_path, "round_1/prompts", *sizes), progress=progress)
    with pytest.raises(CannotContinue):
        write_prompts(work)
    answered = [int(note.split()[2]) for note in progress.notes if note.startswith("wave 1: ")]
    assert answered == sorted(answered) and (answered[0], answered[-1]) == (0, 10)
    assert len(set(answered)) >= 4, "the start, and three batches"
    assert all(note.endswith(" of 10 requests answered") for note in progress.notes if note)
