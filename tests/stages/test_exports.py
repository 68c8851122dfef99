"""Exports: other people's formats, two turns, and commands that lm-eval understands."""

import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from sampling_run import begin_run
from typer.testing import CliRunner

from srlm_mega.chat import Chat
from srlm_mega.cli.main import app
from srlm_mega.errors import UserError
from srlm_mega.evaluation.export_formats import (
    BENCHMARKS,
    AlpacaInstruction,
    MtBenchQuestion,
    lm_eval_commands,
    read_alpaca_instructions,
    read_mt_bench_questions,
)
from srlm_mega.records import PromptTokens, SampledText, SampledTexts
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages import exports
from srlm_mega.stages.exports import Conversation, export_mt_bench
from srlm_mega.stages.head_to_head import RunModel

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["list 2 animals", "list 3 animals"]},
    {"question_id": 101, "category": "math", "turns": ["list 4 animals", "list 5 animals"], "reference": ["x", "y"]},
]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with an M1 of random weights."""
    return begin_run(tmp_path / "toy", ["unused"], "candidates.max_new_tokens=6")


def call(*arguments: object) -> str:
    """A command's output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def test_alpaca_evals_outputs(run: RunDir, tmp_path: Path) -> None:
    asked = [{"instruction": f"list {n} animals", "dataset": "helpful_base"} for n in (2, 3)]
    asked.append({"instruction": "animals " * 200, "dataset": "koala"})
    prompts, out = tmp_path / "alpaca_eval.json", tmp_path / "outputs.json"
    prompts.write_bytes(orjson.dumps(asked))
    said = call("export", "alpaca_eval", run.root / "M1", "--prompts", prompts, "--out", out)
    assert "2 outputs; 1 left out, too long" in said
    outputs = orjson.loads(out.read_bytes())
    assert [list(one) for one in outputs] == [["instruction", "output", "generator", "dataset"]] * 2
    assert [one["instruction"] for one in outputs] == ["list 2 animals", "list 3 animals"]
    assert {one["generator"] for one in outputs} == {"toy-M1"} and {one["dataset"] for one in outputs} == {
        "helpful_base"
    }
    first = out.read_bytes()
    call("export", "alpaca_eval", run.root / "M1", "--prompts", prompts, "--out", out)
    assert out.read_bytes() == first and not (tmp_path / "outputs.json.partial").exists()
    call("export", "alpaca_eval", run.root / "M1", "--prompts", prompts, "--out", out, "--temperature", "1.5")
    assert out.read_bytes() != first


def test_a_folder_from_outside_answers_as_the_runs_own_model(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('[{"instruction": "list 2 animals"}, {"instruction": "list 3 animals"}]')
    (tmp_path / "question.jsonl").write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in QUESTIONS))
    folder = tmp_path / "elsewhere" / "model"
    shutil.copytree(run.weights("M1"), folder)

    def answers(model: Path, *options: object) -> list[str]:
        given, out = ("--prompts", tmp_path / "q.json"), tmp_path / "a.json"
        call("export", "alpaca_eval", model, *given, "--out", out, "--temperature", "0", *options)
        return [one["output"] for one in orjson.loads(out.read_bytes())]

    own = answers(run.root / "M1")
    assert own == answers(folder, "--settings", run.root)
    alone = answers(folder)
    assert all(one.startswith(other) and len(one) > len(other) for one, other in zip(alone, own, strict=True))
    given, out = ("--questions", tmp_path / "question.jsonl"), tmp_path / "b.jsonl"
    call("export", "mt_bench", folder, *given, "--out", out, "--settings", run.root)
    assert len(out.read_bytes().splitlines()) == 2
    assert f"pretrained={folder}" in call("export", "lm_eval", folder)
    (folder / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 32}')
    assert f"pretrained={folder}" in call("export", "lm_eval", folder), "it need not be a Llama"
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    for wrong, options, said in (
        (tmp_path / "elsewhere", [], "has no config.json. Give a Hugging Face model folder"),
        (folder, [], "has max_position_embeddings=None, .*--settings"),
        (run.root / "M1", ["--settings", "toy_cpu"], "answers as its run says: leave out --settings"),
    ):
        with pytest.raises(UserError, match=said):
            raise CliRunner().invoke(app, ["export", "lm_eval", str(wrong), *options]).exception or AssertionError


def test_mt_benchs_answers(run: RunDir, tmp_path: Path) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    questions.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in QUESTIONS))
    call("export", "mt_bench", run.root / "M1", "--questions", questions, "--out", out, "--model-id", "mine")
    answers = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert [one["question_id"] for one in answers] == [81, 101] and {one["model_id"] for one in answers} == {"mine"}
    for one in answers:
        (choice,) = one["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2
        assert all(isinstance(turn, str) for turn in choice["turns"])
    assert len({one["answer_id"] for one in answers}) == 2


def test_the_second_turn_sees_the_first(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[float, list[tuple[int, ...]]]] = []
    ask = Samplers.ask

    def noted(
        self: Samplers, model: SampledModel, requests: list[PromptTokens], params: SamplingParams, file: Path
    ) -> list[SampledTexts]:
        sent.append((params.temperature, [request.token_ids for request in requests]))
        return ask(self, model, requests, params, file)

    monkeypatch.setattr(Samplers, "ask", noted)
    path = tmp_path / "question.jsonl"
    path.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in QUESTIONS))
    export_mt_bench(RunModel.at(run.root / "M1"), read_mt_bench_questions(path), "mine", tmp_path / "out.jsonl")
    chat = Chat.from_folder(run.weights("M1"))
    assert [temperature for temperature, _ in sent] == [0.0, 0.7, 0.0, 0.7]
    (first,), (second,) = sent[0][1], sent[2][1]
    assert first == chat.prompt("list 4 animals")
    middle = second[len(first) : len(second) - len(chat.prompt("list 5 animals"))]
    assert second[: len(first)] == first and second[-len(chat.prompt("list 5 animals")) :] == chat.prompt(
        "list 5 animals"
    )
    answers = [orjson.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert middle[-1] == chat.end_ids[0] and chat.decode(middle) == answers[1]["choices"][0]["turns"][0]


def test_a_cut_off_answer_is_closed_and_any_end_token_closes_one() -> None:
    chat, question = SimpleNamespace(end_ids=(2, 7), decode=str), MtBenchQuestion(1, "writing", ("t",))
    for sampled, kept in (((5, 6), (5, 6, 2)), ((5, 7), (5, 7)), ((5, 2), (5, 2))):
        answered = Conversation(question, (), ()).answered((1,), SampledText("", sampled, "stop", 0), chat)  # type: ignore[arg-type]
        assert answered.token_ids == (1, *kept)


def test_a_turn_that_does_not_fit_is_refused(run: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_bytes(orjson.dumps({"question_id": 7, "category": "math", "turns": ["animals " * 200]}))
    with pytest.raises(UserError, match="turn 1 of questions 7"):
        export_mt_bench(RunModel.at(run.root / "M1"), read_mt_bench_questions(path), "m", tmp_path / "out.jsonl")


class Killed(Exception):
    """An end that no code expects."""


@pytest.mark.parametrize("kind", ["alpaca_eval", "mt_bench"])
def test_an_unfinished_export_resumes_on_whole_files_only(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked = tmp_path / "asked.jsonl"
    questions = [{"instruction": f"list {n} animals"} for n in (2, 3)] if kind == "alpaca_eval" else QUESTIONS
    asked.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in questions))
    option, out = "--prompts" if kind == "alpaca_eval" else "--questions", tmp_path / "out.json"
    argv = ("export", kind, run.root / "M1", option, asked, "--out")
    call(*argv, tmp_path / "whole.json")

    def answers(path: Path) -> list[object]:
        rows = orjson.loads(path.read_bytes()) if kind == "alpaca_eval" else path.read_bytes().splitlines()
        return [row if kind == "alpaca_eval" else orjson.loads(row)["choices"] for row in rows]

    def killed(*arguments: object) -> None:
        raise Killed

    for damage in (lambda path: None, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"{}\n")):
        with monkeypatch.context() as patched:
            patched.setattr(exports, "write_atomic", killed)
            assert isinstance(CliRunner().invoke(app, [*map(str, argv), str(out)]).exception, Killed)
        (tmp_path / f".out.json.{os.uname().nodename}.{2**22 + 1}").write_text("of a killed write")
        kept = sorted((tmp_path / "out.json.partial").glob("*.jsonl"))
        assert kept
        damage(kept[0])
        call(*argv, out)
        assert answers(out) == answers(tmp_path / "whole.json")
        assert {path.name for path in tmp_path.glob("*out*")} | {path.name for path in tmp_path.glob(".out*")} == {
            "out.json"
        }


def test_where_an_export_can_be_written(run: RunDir, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "list 2 animals"}')
    argv = ["export", "alpaca_eval", str(run.root / "M1"), "--prompts", str(prompts), "--out"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk/there.json")
    call(*argv, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == [
        "there.json"
    ]
    (tmp_path / "gone.json").symlink_to(tmp_path / "unmounted/there.json")
    for out, said in ((tmp_path, "is a folder"), (tmp_path / "gone.json", "is a link to .*, which is not there")):
        error = CliRunner().invoke(app, [*argv, str(out)]).exception
        assert isinstance(error, UserError) and re.search(said, str(error))
    assert not (tmp_path / "unmounted").exists()


def test_lm_evals_commands_have_nine_tasks_and_the_shots(run: RunDir) -> None:
    lines = call("export", "lm_eval", run.root / "M1").splitlines()
    by_shots = {}
    for line in lines:
        argv = shlex.split(line)
        assert argv[:3] == ["lm_eval", "--model", "hf"]
        named = dict(zip(argv[1::2], argv[2::2], strict=True))
        by_shots[named["--num_fewshot"]] = named["--tasks"].split(",")
        arguments = dict(part.split("=") for part in named["--model_args"].split(","))
        assert (Path(arguments["pretrained"]) / "config.json").is_file() and arguments["dtype"] == "float32"
        assert arguments["parallelize"] == "True" and "--device" not in named
    assert by_shots["5"] == ["mmlu"] and by_shots["8"] == ["gsm8k"] and len(by_shots["0"]) == 7
    assert len(BENCHMARKS) == 9
    assert "bfloat16" in lm_eval_commands(Path("a b"), "bfloat16", False, Path("o"))[0]
    for line in call("export", "lm_eval", run.root / "M1", "--cpu").splitlines():
        assert "--device cpu" in line and "parallelize" not in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "neither a JSON list of objects"),
        (b'[{"prompt": "x"}]', "entry 1: the field `instruction` is missing"),
        (b'{"instruction": "a"}\n{"instruction": 3}', "entry 2: the field `instruction` is int"),
        (b"[{", "neither a JSON list"),
    ],
)
def test_a_set_is_used_whole_or_not_at_all(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_alpaca_instructions(tmp_path / "set.json")


def test_both_forms_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text('[{"instruction": "a", "dataset": "d"}, {"instruction": " b"}]')
    (tmp_path / "set.jsonl").write_text('{"instruction": "a", "dataset": "d"}\n{"instruction": " b"}\n')
    wanted = [AlpacaInstruction("a", "d"), AlpacaInstruction(" b", "")]
    assert read_alpaca_instructions(tmp_path / "set.json") == read_alpaca_instructions(tmp_path / "set.jsonl") == wanted


def test_a_question_without_turns_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "turns": []}')
    with pytest.raises(UserError, match="entry 1: `turns` is not a list of texts"):
        read_mt_bench_questions(tmp_path / "q.jsonl")


def test_only_a_finished_model_can_be_exported(run: RunDir) -> None:
    for wrong in (run.root / "M7", run.root, run.root / "seed"):
        with pytest.raises(UserError):
            RunModel.at(wrong)
