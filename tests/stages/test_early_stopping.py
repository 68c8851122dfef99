"""Early stopping: the rule, what is due by the files, and the comparison of two checkpoints by judges of every kind."""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from early_stopping_run import prefers
from fake_endpoint import Asked, Reply, completion, fake_endpoint
from judge_model import write_always_a
from places import ROOT
from sampling_run import with_files, write_model

from srlm_mega.config import Config
from srlm_mega.config.comparison import EarlyStoppingConfig
from srlm_mega.config.file import check_endpoints, load_config, to_yaml
from srlm_mega.controller.stage_process import comparison_command
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import CANNOT_CONTINUE, USER_ERROR, UserError
from srlm_mega.evaluation.checkpoint_choice import EarlyStoppingFiles, Exported, Verdict, comparison_steps, decide
from srlm_mega.evaluation.results import Comparison
from srlm_mega.evaluation.win_rates import HeadToHead
from srlm_mega.judging import endpoint
from srlm_mega.records import Candidate, PairwiseJudgement, Prompt, read_jsonl, write_jsonl
from srlm_mega.run.identity import config_of, identity_of
from srlm_mega.run.outside_folder import content_hash
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress, ProgressState, read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import seal_of
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.early_stopping import compare_checkpoints
from srlm_mega.stages.pausing import check_none_lost, check_not_beyond, is_waiting, keep_best
from srlm_mega.stages.work import Work

TOY = ROOT / "launch/configs/toy_cpu.yaml"
JUDGE = ["early_stopping.judge.model=j"]
VARIABLE = "early_stopping.judge.api_key_variable=JUDGE_KEY"
KEY = "sk-a-very-secret-key-0123456789"


def settings(**changes: object) -> EarlyStoppingConfig:
    return EarlyStoppingConfig.model_validate({"judge": {"model": "j"}} | changes)


def verdicts_of(scores: Sequence[float], steps: Sequence[int], last: int, **changes: object) -> list[Verdict]:
    """What is decided as these scores come in, until training ends."""
    verdicts: list[Verdict] = []
    for step, score in zip(steps, scores, strict=True):
        result = HeadToHead(10, 10, 0, 0, 0, score, 0.0, 1.0)
        comparison = Comparison("new", "old", "j", 10, 0, 0, 0, 0, result, None)
        verdicts.append(decide(settings(**changes), step, last, comparison, verdicts))
        if verdicts[-1].stop:
            break
    return verdicts


def test_every_interval_and_the_last_step_are_compared() -> None:
    assert comparison_steps(200, 744) == [200, 400, 600, 744]
    assert comparison_steps(200, 600) == [200, 400, 600]
    assert comparison_steps(200, 100) == [100]


def test_a_newer_one_that_loses_stops_and_the_older_is_kept() -> None:
    verdicts = verdicts_of([0.7, 0.5, 0.49, 0.9], [200, 400, 600, 744], last=744)
    assert [(one.step, one.against, one.kept, one.stop) for one in verdicts] == [
        (200, 0, 200, False),
        (400, 200, 400, False),
        (600, 400, 400, True),
    ]
    assert verdicts[-1].reason == "step 600 scores 0.490 against step 400, below 0.5: step 400 is kept; training stops"


def test_the_first_one_is_compared_with_where_training_started() -> None:
    (only,) = verdicts_of([0.3], [200], last=744)
    assert (only.against, only.kept, only.stop) == (0, 0, True)


def test_with_patience_the_best_one_is_what_others_are_compared_with() -> None:
    verdicts = verdicts_of([0.7, 0.4, 0.6, 0.4, 0.4], [2, 4, 6, 8, 10], last=20, patience=2)
    assert [(one.against, one.kept, one.lost_in_a_row, one.stop) for one in verdicts] == [
        (0, 2, 0, False),
        (2, 2, 1, False),
        (2, 6, 0, False),
        (6, 6, 1, False),
        (6, 6, 2, True),
    ]


def test_the_last_step_ends_training_whoever_wins() -> None:
    for score, kept in ((0.6, 4), (0.4, 2)):
        last = verdicts_of([0.6, score], [2, 4], last=4, patience=3)[-1]
        assert (last.kept, last.stop) == (kept, True) and "last step" in last.reason


def test_where_it_is_on_it_decides_the_models_bytes() -> None:
    on = load_config(TOY, ["early_stopping.judge.model=j"])
    off = load_config(TOY, [])
    assert "seed" in find_stage(on, "M2").inputs and "seed" not in find_stage(off, "M2").inputs
    assert "early_stopping.patience" in find_keys(on, "M2") and "early_stopping.patience" not in find_keys(on, "M1")
    assert "early_stopping.patience" in find_keys(load_config(TOY, [*JUDGE, "early_stopping.stages=[sft]"]), "M1")
    assert not [key for key in find_keys(off, "M2") if key.startswith("early_stopping")]
    assert "early_stopping.judge.timeout_seconds" not in find_keys(on, "M2"), "how the judge is reached may change"


def find_keys(config: Config, stage: str) -> set[str]:
    return set(config_of(find_stage(config, stage), config))


@pytest.fixture
def paused(tmp_path: Path) -> Callable[..., RunDir]:
    """A run whose M2 waits for the comparison of its checkpoint of step 2 with M1."""

    def build(*overrides: str) -> RunDir:
        run = RunDir(tmp_path / "run")
        run.root.mkdir()
        small = [f"run.dir={run.root}", "candidates.max_new_tokens=6", "early_stopping.eval_interval=2"]
        config = load_config(TOY, [*small, *(f"early_stopping.{override}" for override in overrides)])
        run.config_file.write_text(to_yaml(config))
        prompts = [Prompt(f"v{number}", f"list {number} animals", "test") for number in range(2, 6)]
        with_files(run, config, "seed", lambda out: write_jsonl(out / "validation.jsonl", prompts))
        for name in ("round_1/pairs", "round_1/reference"):
            with_files(run, config, name, lambda out: (out / "file").write_text(""))
        with_files(run, config, "M1", lambda out: write_model(config, out / "huggingface", toy_tokenizer()))
        partial = run.begin(identity_of(find_stage(config, "M2"), config, run), resumable=True)
        files = EarlyStoppingFiles(partial)
        write_model(config, files.export(2), toy_tokenizer(), seed=2)
        files.write_exported(2, Exported(6, 7, 0, 15))
        return run

    return build


def compare(run: RunDir) -> tuple[int, ProgressState]:
    """The exit code of the comparison, and what it left for the controller."""
    code = compare_checkpoints(run, "M2")
    return code, read_progress(run.progress_file("M2/early_stopping"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Second tries at once."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(endpoint, "LONGEST_WAIT_SECONDS", 0.0)
    yield


@pytest.mark.parametrize(("wanted", "kept", "stop"), [("newer", 2, False), ("older", 0, True)])
def test_an_endpoint_that_prefers_one(
    paused: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, wanted: str, kept: int, stop: bool
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    folder: list[Path] = []
    with fake_endpoint(lambda asked: prefers(wanted, folder[0], asked)) as fake:
        run = paused("judge.model=j", f"judge.endpoint={fake.url}", "judge.api_key_variable=JUDGE_KEY")
        folder.append(run.partial("M2"))
        assert compare(run)[0] == 0
    files = EarlyStoppingFiles(folder[0])
    (verdict,) = files.verdicts()
    assert (verdict.kept, verdict.stop, verdict.against) == (kept, stop, 0)
    result = verdict.comparison.result
    assert result is not None and result.prompts == 4 and verdict.comparison.judge == "j"
    assert {result.wins, result.losses} == {0, 4 - result.ties}
    assert len(fake.asked) == 8 and files.waiting() is None
    ours = {one.prompt_id: one for one in read_jsonl(files.responses(2), Candidate)}
    judged = list(read_jsonl(files.judgements(2), PairwiseJudgement))
    assert [one.ours_first for one in judged] == [True, False] * 4
    assert {one.model_hash for one in ours.values()} == {"M2 step 2"} and all(one.decoding for one in ours.values())


def test_a_local_judge_that_always_says_a_is_a_tie(paused: Callable[..., RunDir], tmp_path: Path) -> None:
    write_always_a(tmp_path / "judge")
    run = paused(f"judge.model={tmp_path / 'judge'}", "judge.max_new_tokens=8")
    assert compare(run)[0] == 0
    (verdict,) = EarlyStoppingFiles(run.partial("M2")).verdicts()
    result = verdict.comparison.result
    assert result is not None and (result.ties, result.score) == (4, 0.5)
    assert (verdict.kept, verdict.stop) == (2, False), "0.5 is not below 0.5"
    judged = list(read_jsonl(EarlyStoppingFiles(run.partial("M2")).judgements(2), PairwiseJudgement))
    assert {one.verdict for one in judged} == {"first"} and {one.text for one in judged} == {"Verdict : A"}


def test_what_was_damaged_since_is_made_again(
    paused: Callable[..., RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses and judgements of a comparison that was killed, and a verdict: to the same bytes."""
    write_always_a(tmp_path / "judge")
    run = paused(f"judge.model={tmp_path / 'judge'}", "judge.max_new_tokens=8")
    assert compare(run)[0] == 0
    files = EarlyStoppingFiles(run.partial("M2"))
    verdict = files.step_folder(2) / "verdict.json"
    paths = (files.responses(0), files.responses(2), files.judgements(2), verdict)
    whole = [path.read_bytes() for path in paths]
    for path, content in zip(paths, whole, strict=True):
        for wrong in (b"", b"".join(content.splitlines(keepends=True)[:-1]), content.replace(b"2", b"1")):
            if path != verdict:
                verdict.unlink()
            path.write_bytes(wrong)
            assert (files.verdicts(), files.waiting()) == ([], 2) and is_waiting(files, 2)
            assert compare(run)[0] == 0 and [path.read_bytes() for path in paths] == whole
            said = capsys.readouterr().out
            assert said.count(f"{path} is not as it was written") == 1 == said.count("it is made again"), said
    verdict.unlink()
    capsys.readouterr()
    assert compare(run)[0] == 0 and "made again" not in capsys.readouterr().out
    for path in (verdict, files.step_folder(2) / "exported.json"):
        seal_of(path).unlink()  # as an older version wrote them
    assert files.verdicts()[0].kept == 2 and files.exported(2) is not None


def test_weights_that_are_not_as_they_were_exported_are_not_sampled(paused: Callable[..., RunDir]) -> None:
    run = paused("judge.model=j", "judge.endpoint=http://127.0.0.1:9/v1")
    files = EarlyStoppingFiles(run.partial("M2"))
    assert is_waiting(files, 2)
    weights = files.export(2) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, said = compare(run)
    assert code == USER_ERROR and f"{weights} was altered" in said.message and "--redo M2" in said.message
    assert not is_waiting(files, 2) and not files.step_folder(2).exists(), "it is exported again"


@pytest.mark.parametrize("kept", [0, 2])
def test_the_best_checkpoint_is_kept_as_it_was_exported(paused: Callable[..., RunDir], kept: int) -> None:
    run = paused("judge.model=j", "judge.endpoint=http://127.0.0.1:9/v1")
    config, files = load_config(run.config_file), EarlyStoppingFiles(run.partial("M2"))
    (verdict,) = verdicts_of([0.6 if kept else 0.4], [2], last=2)
    stage, final = find_stage(config, "M2"), run.partial("M2") / "huggingface"
    work = Work(run, config, stage, run.partial("M2"), Progress(tmp := run.root / "p.json"), Samplers(config, tmp))
    whole = (files.export(2) if kept else run.weights("M1")).joinpath("model.safetensors").read_bytes()
    for _ in range(2):  # the second attempt finds what the first left
        keep_best(work, files, [verdict], run.weights("M1"))
        assert (final / "model.safetensors").read_bytes() == whole
    (final / "model.safetensors").write_bytes(whole[:-1])
    if kept:
        with pytest.raises(UserError, match=rf"{final}/model\.safetensors has {len(whole) - 1} bytes.*--redo M2"):
            keep_best(work, files, [verdict], run.weights("M1"))
    else:
        keep_best(work, files, [verdict], run.weights("M1"))
        assert (final / "model.safetensors").read_bytes() == whole


def test_a_lost_record_of_an_export_that_was_compared_ends_nothing(paused: Callable[..., RunDir]) -> None:
    """And what is missing in the middle is never passed over."""
    run = paused("judge.model=j", "judge.endpoint=http://127.0.0.1:9/v1")
    config, files = load_config(run.config_file), EarlyStoppingFiles(run.partial("M2"))
    shutil.copytree(files.export(2), files.export(4))
    files.write_exported(4, Exported(6, 7, 0, 15))
    for verdict in verdicts_of([0.6, 0.6], [2, 4], last=6):
        files.write_verdict(verdict)
    record = files.step_folder(2) / "exported.json"
    content = record.read_bytes()
    record.unlink()
    assert ([one.step for one in files.verdicts()], files.waiting()) == ([2, 4], None)
    (files.step_folder(2) / "verdict.json").rename(run.root / "kept.json")
    record.write_bytes(content)
    assert (files.verdicts(), files.waiting()) == ([], 2)
    record.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"step_0000002/exported\.json is missing or damaged"):
        files.waiting()
    shutil.rmtree(files.step_folder(2))
    stage = find_stage(config, "M2")
    work = Work(run, config, stage, run.partial("M2"), Progress(tmp := run.root / "p.json"), Samplers(config, tmp))
    with pytest.raises(UserError, match=r"step_0000002 is not there.*--redo M2"):
        check_none_lost(work, files, files.verdicts(), [2, 4, 6])
    check_not_beyond(work, files, 4, 4)
    with pytest.raises(UserError, match=r"after step 4, and .* is of step 6: .*--redo M2, which removes what M2 has"):
        check_not_beyond(work, files, 4, 6)


def test_another_judge_behind_the_same_path_ends_the_comparisons(paused: Callable[..., RunDir], tmp_path: Path) -> None:
    write_always_a(tmp_path / "judge")
    run = paused(f"judge.model={tmp_path / 'judge'}", "judge.max_new_tokens=8")
    assert compare(run)[0] == 0
    files = EarlyStoppingFiles(run.partial("M2"))
    before = content_hash(tmp_path / "judge")
    assert [one.comparison.judge for one in files.verdicts()] == [before]
    shutil.copytree(files.export(2), files.export(4))
    files.write_exported(4, Exported(6, 7, 0, 15))
    weights = tmp_path / "judge/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, said = compare(run)
    assert code == USER_ERROR and f"has another model ({content_hash(tmp_path / 'judge')})" in said.message
    assert f"than when it judged M2 ({before})" in said.message and "--redo M2, which removes" in said.message
    assert not files.responses(4).exists(), "it is refused before anything is sampled"
    weights.write_bytes(whole)
    assert compare(run)[0] == 0


@pytest.mark.parametrize("name", ["M1/huggingface/model.safetensors", "seed/validation.jsonl"])
def test_nothing_is_sampled_that_was_altered(paused: Callable[..., RunDir], name: str) -> None:
    run = paused("judge.model=j", "judge.endpoint=http://127.0.0.1:9/v1")
    content = (run.root / name).read_bytes()
    (run.root / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    code, said = compare(run)
    assert code == USER_ERROR and f"{run.root / name} was altered" in said.message
    assert not EarlyStoppingFiles(run.partial("M2")).responses(0).exists()


def test_words_that_are_no_verdict_stop_the_run(paused: Callable[..., RunDir]) -> None:
    with fake_endpoint(lambda asked: completion("I would rather not say.")) as fake:
        run = paused("judge.model=j", f"judge.endpoint={fake.url}")
        code, said = compare(run)
    assert code == CANNOT_CONTINUE == said.exit_code and "0 of 4 prompts" in said.message and "8 of its" in said.message
    assert EarlyStoppingFiles(run.partial("M2")).verdicts() == []


def test_garbage_and_time_outs_stop_the_run_and_it_goes_on_where_it_was(
    paused: Callable[..., RunDir], no_waiting: None
) -> None:
    """Half of the questions are answered; then none; then all."""
    mood, folder = ["html"], list[Path]()

    def reply(asked: Asked) -> Reply:
        if "list 2" in asked.text or mood[0] == "well":
            return prefers("newer", folder[0], asked)
        return Reply(200, b"<html>") if mood[0] == "html" else Reply(hang=True)

    with fake_endpoint(reply) as fake:
        run = paused("judge.model=j", f"judge.endpoint={fake.url}", "judge.attempts=2")
        folder.append(run.partial("M2"))
        responses = EarlyStoppingFiles(run.partial("M2")).responses(2)
        for mood[0], cause in (("html", "not a chat completion: <html>"), ("hang", "no whole answer within 2 s")):
            if mood[0] == "hang":
                patience = load_config(run.config_file, ["early_stopping.judge.timeout_seconds=2"])
                run.config_file.write_text(to_yaml(patience))
            code, said = compare(run)
            assert code == CANNOT_CONTINUE and "6 questions to the judge j" in said.message and cause in said.message
            assert "its `max_failed_share` allows 0" in said.message
            assert EarlyStoppingFiles(run.partial("M2")).verdicts() == []
        written = responses.stat().st_mtime_ns
        mood[0] = "well"
        assert compare(run)[0] == 0
    assert responses.stat().st_mtime_ns == written, "the responses were sampled once"
    assert len(EarlyStoppingFiles(run.partial("M2")).verdicts()) == 1


def test_a_few_failures_are_counted_and_leave_the_comparison(paused: Callable[..., RunDir], no_waiting: None) -> None:
    folder: list[Path] = []

    def reply(asked: Asked) -> Reply:
        return Reply(400, b"too long") if "list 2" in asked.text else prefers("newer", folder[0], asked)

    with fake_endpoint(reply) as fake:
        run = paused("judge.model=j", f"judge.endpoint={fake.url}", "judge.max_failed_share=0.3")
        folder.append(run.partial("M2"))
        assert compare(run)[0] == 0
    (verdict,) = EarlyStoppingFiles(folder[0]).verdicts()
    result = verdict.comparison.result
    assert result is not None and (verdict.comparison.failed, result.prompts) == (1, 3)


def test_the_key_is_nowhere_in_the_run(
    paused: Callable[..., RunDir],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The endpoint repeats the key in every answer."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        caplog.at_level(logging.DEBUG),
        fake_endpoint(lambda asked: completion(f"You said {asked.headers['Authorization']}. Verdict: tie")) as fake,
    ):
        run = paused("judge.model=j", f"judge.endpoint={fake.url}", "judge.api_key_variable=JUDGE_KEY")
        assert compare(run)[0] == 0
    assert KEY in fake.asked[0].headers["Authorization"], "it was sent"
    written = [path for path in run.root.rglob("*") if path.is_file()]
    assert any(b"[key]" in path.read_bytes() for path in written)
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert KEY not in caplog.text + "".join(capfd.readouterr())


def test_what_a_judge_needs_is_missed_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    config = load_config(TOY, [*JUDGE, "early_stopping.judge.endpoint=http://host/v1"])
    check_endpoints(config)
    with pytest.raises(UserError, match="JUDGE_KEY, which is not set"):
        check_endpoints(load_config(TOY, [*JUDGE, "early_stopping.judge.endpoint=http://host/v1", VARIABLE]))


def test_a_judge_without_llamas_tokens_is_refused(paused: Callable[..., RunDir], tmp_path: Path) -> None:
    run = paused(f"judge.model={tmp_path / 'nothing'}")
    code, said = compare(run)
    assert code == USER_ERROR and "tokenizer.json" in said.message


def test_where_a_comparison_runs(tmp_path: Path) -> None:
    """Here: its replicas run in the container, and an endpoint is asked from here."""
    run, stage = RunDir(tmp_path), find_stage(load_config(TOY, JUDGE), "M2")
    endpoint, container = "early_stopping.judge.endpoint=http://host/v1", "sampler.container=image"

    for overrides in ((), (endpoint,), (endpoint, VARIABLE, container), (container,)):
        argv = comparison_command(stage, load_config(TOY, [*JUDGE, *overrides]), run).argv
        assert argv[0].endswith("srlm") and argv[1:] == ["compare-checkpoints", str(tmp_path), "M2"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*JUDGE, "round.method=positives_sft"], "round.method=positives_sft trains by SFT"),
        (["evaluation.pairwise_judge.model=j"], "needs evaluation.pairwise=true"),
        (["early_stopping.patience=2"], "early_stopping.judge is required"),
        ([*JUDGE, "early_stopping.stop_below=1.5"], "early_stopping.stop_below"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(TOY, overrides)
