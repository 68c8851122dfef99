"""srlm evaluate head-to-head: two finished models, any judge, a folder that goes on after a kill."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from fake_endpoint import Asked, Reply, completion, fake_endpoint
from judge_model import write_always_a
from sampling_run import VALIDATION, begin_run, write_model
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.data.toy_world.truth import quality
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import CannotContinue, UserError, exit_code
from srlm_mega.evaluation.results import Comparison
from srlm_mega.records import Candidate, Prompt, parse_line, read_jsonl, write_jsonl
from srlm_mega.run import manifest
from srlm_mega.run.outside_folder import content_hash
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import seal_of
from srlm_mega.stages.head_to_head import asked_prompts, writer_at


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A run's M1, another model's folder, and prompts."""
    run: RunDir = begin_run(tmp_path / "toy", ["unused"], "candidates.max_new_tokens=6")
    write_model(load_config(run.config_file), tmp_path / "other", toy_tokenizer(), seed=5)
    write_jsonl(tmp_path / "prompts.jsonl", [Prompt(f"t{n}", f"list {n} animals", "test") for n in range(2, 8)])
    return run.root / "M1", tmp_path / "other", tmp_path / "prompts.jsonl"


def test_prompts_in_any_form(tmp_path: Path) -> None:
    """A file of srlm's keeps its ids, which judges of ground truth and finished answers go by."""
    own = [Prompt("t1", "list 2 animals", "test", "Be brief."), Prompt("t2", "list 3 animals", "valid")]
    write_jsonl(tmp_path / "own.jsonl", own)
    assert asked_prompts(tmp_path / "own.jsonl") == own
    (tmp_path / "plain.txt").write_text("list 2 animals\nlist 3 animals\n")
    assert asked_prompts(tmp_path / "plain.txt")[1] == Prompt("plain-000002", "list 3 animals", "plain.txt")
    write_jsonl(tmp_path / "sft.jsonl", [{"id": 7, "prompt": "Hi?", "completion": "Hello."}])
    assert asked_prompts(tmp_path / "sft.jsonl") == [Prompt("7", "Hi?", "sft.jsonl")]
    write_jsonl(tmp_path / "twice.jsonl", [own[0], replace(own[1], id="t1")])
    with pytest.raises(UserError, match="has 1 ids several times, such as t1"):
        asked_prompts(tmp_path / "twice.jsonl")


def call(models: tuple[Path, Path, Path], out: Path, *options: str) -> tuple[int, str, BaseException | None]:
    ours, theirs, prompts = models
    argv = ["evaluate", "head-to-head", str(ours), str(theirs), "--prompts", str(prompts), "--out", str(out), *options]
    done = CliRunner().invoke(app, argv)
    return done.exit_code, done.output, done.exception


def test_an_opponent_that_is_no_model(tmp_path: Path) -> None:
    """It may be of any place, so that nothing is said of runs."""
    for wrong, said in (
        (tmp_path, "has no config.json. Give a Hugging"),
        (Path("some/model"), "hf download some/model"),
    ):
        with pytest.raises(UserError, match=said):
            writer_at(wrong)


def test_wins_ties_and_losses_with_their_interval(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The judge likes ours on three prompts, theirs on one, and is drawn to the first response on two."""

    def reply(asked: Asked) -> Reply:
        mine = {one.prompt: one.text for one in read_jsonl(tmp_path / "out/ours/responses.jsonl", Candidate)}
        instruction, first, _ = asked.parts
        number = int(instruction.split()[1])
        if number >= 6:
            return completion("Verdict: A")
        wanted_first = (first == mine[instruction]) == (number < 5)
        return completion(f"Verdict: {'A' if wanted_first else 'B'}")

    with fake_endpoint(reply) as fake:
        code, said, error = call(models, tmp_path / "out", "--judge", "j", "--endpoint", fake.url)
        assert code == 0, (said, error)
        asked = len(fake.asked)
        assert call(models, tmp_path / "out", "--judge", "j", "--endpoint", fake.url)[0] == 0
        assert len(fake.asked) == asked == 12, "what was judged is not asked again"
    comparison = parse_line(Comparison, (tmp_path / "out/result.json").read_bytes())
    result = comparison.result
    assert result is not None and (result.wins, result.ties, result.losses) == (3, 2, 1)
    assert "wins 3 (50.0%), ties 2 (33.3%), losses 1 (16.7%)" in said and "Wilson" in said
    assert result.score == pytest.approx(4 / 6) and result.score_low < 4 / 6 < result.score_high


def test_what_was_damaged_since_is_made_again(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Emptied, cut, edited, or another's with its seal: the files are those of the undisturbed comparison."""

    def reply(asked: Asked) -> Reply:
        return completion(f"Verdict: {'A' if int(asked.parts[0].split()[1]) % 2 else 'tie'}")

    out = tmp_path / "out"
    with fake_endpoint(reply) as fake:
        options = ("--judge", "j", "--endpoint", fake.url)
        assert call(models, out, *options)[0] == 0
        whole = contents(out)
        for name, other in (
            ("ours/responses.jsonl", "theirs/responses.jsonl"),
            ("theirs/responses.jsonl", "judgements.jsonl"),
            ("judgements.jsonl", "ours/responses.jsonl"),
            ("result.json", None),
        ):
            content, asked = whole[out / name], len(fake.asked)
            (out / name).write_bytes(content.replace(b"e", b"a"))
            (out / f".{name.rpartition('/')[2]}.{os.uname().nodename}.{2**22 + 1}").write_text("of a killed write")
            assert call(models, out, *options)[0] == 0
            (out / name).write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
            assert call(models, out, *options)[0] == 0
            if other is not None:
                seal_of(out / name).write_bytes(seal_of(out / other).read_bytes())
                (out / name).write_bytes(whole[out / other])
                assert call(models, out, *options)[0] == 0
            assert contents(out) == whole, name
            assert (len(fake.asked) > asked) == (name == "judgements.jsonl"), "questions that stand are not asked again"


def contents(out: Path) -> dict[Path, bytes]:
    """All files of a comparison, hidden ones too, but for the one that holds seconds."""
    return {path: path.read_bytes() for path in out.rglob("*.json*") if path.name != "metrics.jsonl"}


def test_a_folder_to_write_that_is_a_link(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    write_always_a(tmp_path / "judge")
    options = ("--judge", str(tmp_path / "judge"))
    (tmp_path / "out").symlink_to(tmp_path / "there")
    code, _, error = call(models, tmp_path / "out", *options)
    assert code != 0 and "out is a link to" in str(error) and "which is not there" in str(error)
    (tmp_path / "there").write_text("")
    code, _, error = call(models, tmp_path / "out", *options)
    assert code != 0 and "was not made by this command" in str(error)
    (tmp_path / "there").unlink()
    assert call(models, tmp_path / "there", *options)[0] == 0
    assert call(models, tmp_path / "out", *options)[0] == 0


def test_a_folder_of_something_else_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    write_always_a(tmp_path / "judge")
    assert call(models, tmp_path / "out", "--judge", str(tmp_path / "judge"))[0] == 0
    assert orjson.loads((tmp_path / "out/result.json").read_bytes())["result"]["ties"] == 6
    code, _, error = call(models, tmp_path / "out", "--judge", str(tmp_path / "judge"), "--temperature", "0.7")
    assert code != 0 and "is of other models, prompts, settings" in str(error)
    config_file = models[0].parent / "config.yaml"  # a run's sampler may be set anew after its end
    config_file.write_text(to_yaml(load_config(config_file, ["sampler.batch_size=32"])))
    code, _, error = call(models, tmp_path / "out", "--judge", str(tmp_path / "judge"))
    assert code != 0 and "config.yaml is not what round_1/prompts was made with" in str(error)
    shutil.rmtree(models[0].parent / "round_1")
    code, _, error = call(models, tmp_path / "out", "--judge", str(tmp_path / "judge"))
    assert code != 0 and "is of other models, prompts, settings" in str(error)


@pytest.mark.parametrize(
    "identity", [b'["M1", {}, {}]', b'{"ours": "M1"}', b'{"settings": [1]}', b"", b'{"settings": {']
)
def test_a_folder_of_another_command_is_refused(
    models: tuple[Path, Path, Path], tmp_path: Path, identity: bytes
) -> None:
    write_always_a(tmp_path / "judge")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/identity.json").write_bytes(identity)
    code, _, error = call(models, tmp_path / "out", "--judge", str(tmp_path / "judge"))
    assert code != 0 and isinstance(error, UserError) and "is of other models, prompts, settings" in str(error)


def test_by_m1_where_no_judge_is_named(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A random M1 with 128 positions: every question is too long for it, and nothing is invented."""
    _, _, error = call(models, tmp_path / "out")
    assert isinstance(error, CannotContinue) and exit_code(error) == 3, error
    assert "no prompt has a verdict in both orders" in str(error) and "6 too long for the judge" in str(error)
    assert "Give another judge (--judge FOLDER" in str(error) and f"{models[0]} (" in str(error)
    assert parse_line(Comparison, (tmp_path / "out/result.json").read_bytes()).result is None


def test_another_model_behind_the_same_path_is_another_comparison(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Of the other side, and of the judge: both go by their content."""
    theirs, judge = models[1], tmp_path / "judge"
    write_always_a(judge)
    assert call(models, tmp_path / "out", "--judge", str(judge))[0] == 0
    before = parse_line(Comparison, (tmp_path / "out/result.json").read_bytes())
    assert before.theirs == str(theirs) and before.theirs_hash == content_hash(theirs) != before.ours_hash
    assert before.judge == f"{judge} ({content_hash(judge)})"
    answers = list(read_jsonl(tmp_path / "out/theirs/responses.jsonl", Candidate))
    assert {one.model_hash for one in answers} == {before.theirs_hash}
    for folder in (theirs, judge):
        flip_bit(folder / "model.safetensors")
        code, _, error = call(models, tmp_path / "out", "--judge", str(judge))
        assert code != 0 and "is of other models, prompts, settings or another judge" in str(error), folder
        flip_bit(folder / "model.safetensors")
    given = models[2].read_bytes()
    models[2].write_bytes(given.replace(b"list 7", b"list 8"))
    code, _, error = call(models, tmp_path / "out", "--judge", str(judge))
    assert code != 0 and "is of other models, prompts, settings or another judge" in str(error)
    models[2].write_bytes(given)
    assert call(models, tmp_path / "out", "--judge", str(judge))[0] == 0
    moved = theirs.rename(tmp_path / "moved")
    models = models[0], moved, models[2]
    assert call(models, tmp_path / "out", "--judge", str(judge))[0] == 0, "the path does not count"
    after = parse_line(Comparison, (tmp_path / "out/result.json").read_bytes())
    assert replace(after, theirs=before.theirs) == before


@pytest.mark.parametrize("name", ["M1/huggingface/model.safetensors", "seed/validation.jsonl", "config.yaml"])
def test_nothing_of_a_run_is_used_that_was_altered(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not even where the quick check sees sizes alone. Exports use the same."""
    monkeypatch.setattr(manifest, "QUICK_HASH_BYTES", 10_000)
    altered = models[0].parent / name
    if name == "config.yaml":
        altered.write_text(altered.read_text().replace("vocab_size: 128", "vocab_size: 256"))
    else:
        flip_bit(altered)
    (tmp_path / "alpaca.json").write_text('[{"instruction": "list 2 animals", "dataset": "x"}]')
    export = ["export", "alpaca_eval", str(models[0]), "--prompts", str(tmp_path / "alpaca.json"), "--out", "x.json"]
    head_to_head = ["evaluate", "head-to-head", str(models[0]), str(models[1]), "--out", str(tmp_path / "out")]
    for argv in (head_to_head, export, ["export", "lm_eval", str(models[0])]):
        error = CliRunner().invoke(app, argv).exception
        assert isinstance(error, UserError) and str(altered) in str(error), argv
    assert not (tmp_path / "out").exists()


def test_the_toy_world_is_judged_by_its_truth(tmp_path: Path) -> None:
    """The words on the README: no option but --out. Its M1 has 128 positions, and could read no question."""
    run = begin_run(tmp_path / "toy", ["unused"], "candidates.max_new_tokens=6")
    write_model(load_config(run.config_file), tmp_path / "other", toy_tokenizer(), seed=5)
    argv = ["evaluate", "head-to-head", str(run.root / "M1"), str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, argv)
    assert done.exit_code == 0 and "judged by ground truth" in done.output, done.output + str(done.exception)
    comparison = parse_line(Comparison, (tmp_path / "out/result.json").read_bytes())
    ours, theirs = (
        {one.prompt_id: quality(one.prompt, one.text) for one in read_jsonl(tmp_path / "out" / side, Candidate)}
        for side in ("ours/responses.jsonl", "theirs/responses.jsonl")
    )
    found = comparison.result
    assert found is not None and (comparison.prompts, comparison.judge) == (len(VALIDATION), "ground truth")
    assert found.wins == sum(ours[name] > theirs[name] for name in ours)
    assert found.losses == sum(ours[name] < theirs[name] for name in ours)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_an_endpoint_without_a_judge_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    code, _, error = call(models, tmp_path / "out", "--endpoint", "http://host/v1")
    assert code != 0 and "--judge NAME" in str(error)
