"""The formats of other people's evaluations: AlpacaEval 2's outputs, MT-Bench's answers, a command line of lm-eval.

They were written from these projects' sources and never met their judges: no key and no GPU was at hand.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
import xxhash

from srlm_mega.data.quarantine import json_object, numbered_lines, text_field
from srlm_mega.errors import UserError

# FastChat's temperatures by category; any other category has 0.7.
MT_BENCH_TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
T = TypeVar("T")


@dataclass(frozen=True)
class AlpacaInstruction:
    """One of AlpacaEval's prompts, and the set it is from."""

    instruction: str
    dataset: str


@dataclass(frozen=True)
class AlpacaOutput:
    """A line of AlpacaEval's `model_outputs`."""

    instruction: str
    output: str
    generator: str
    dataset: str


@dataclass(frozen=True)
class MtBenchQuestion:
    """One of MT-Bench's questions. FastChat's ids are numbers."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def temperature(self) -> float:
        """With which it is answered."""
        return MT_BENCH_TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper as a task of lm-eval. The shots are the Llama 2 paper's, whose numbers the paper's first
    row repeats."""

    name: str
    task: str
    shots: int


BENCHMARKS = (
    Benchmark("ARC-e", "arc_easy", 0),
    Benchmark("ARC-c", "arc_challenge", 0),
    Benchmark("HellaSwag", "hellaswag", 0),
    Benchmark("SIQA", "social_iqa", 0),
    Benchmark("PIQA", "piqa", 0),
    Benchmark("GSM8K", "gsm8k", 8),
    Benchmark("MMLU", "mmlu", 5),
    Benchmark("OBQA", "openbookqa", 0),
    Benchmark("NQ", "nq_open", 0),
)


def read_alpaca_instructions(path: Path) -> list[AlpacaInstruction]:
    """AlpacaEval's set: a JSON list (`alpaca_eval.json`), or one object per line, each with `instruction` and, where
    there is one, `dataset`. UserError names the first entry that has none: the set is used whole or not at all."""

    def parse(fields: dict[str, Any]) -> AlpacaInstruction:
        text_field(fields, "instruction")
        return AlpacaInstruction(str(fields["instruction"]), str(fields.get("dataset", "")))

    return [in_place(path, number, parse, fields) for number, fields in objects(path)]


def read_mt_bench_questions(path: Path) -> list[MtBenchQuestion]:
    """FastChat's `question.jsonl`. UserError names the first line that is no question."""

    def parse(fields: dict[str, Any]) -> MtBenchQuestion:
        turns = fields.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError("`turns` is not a list of texts")
        if not isinstance(fields.get("question_id"), int | str):
            raise ValueError("`question_id` is no number")
        return MtBenchQuestion(fields["question_id"], str(fields.get("category", "")), tuple(turns))

    return [in_place(path, number, parse, fields) for number, fields in objects(path)]


def in_place(path: Path, number: int, parse: Callable[[dict[str, Any]], T], fields: dict[str, Any]) -> T:
    """A parsed entry; UserError says where the file has none."""
    try:
        return parse(fields)
    except ValueError as error:
        raise UserError(f"{path}: entry {number}: {error}") from None


def objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON list or of JSON lines, counted from 1."""
    lines = list(numbered_lines(path))
    content = b"\n".join(line for _, line in lines)
    try:
        if content.lstrip().startswith(b"["):
            return [(number, json_object(orjson.dumps(one))) for number, one in enumerate(orjson.loads(content), 1)]
        return [(number, json_object(line)) for number, line in lines]
    except ValueError as error:
        raise UserError(f"{path} is neither a JSON list of objects nor JSON lines: {error}") from None


def alpaca_json(outputs: Sequence[AlpacaOutput]) -> bytes:
    """What `alpaca_eval --model_outputs` reads."""
    return orjson.dumps(list(outputs), option=orjson.OPT_INDENT_2)


def mt_bench_line(question: MtBenchQuestion, model_id: str, turns: Sequence[str], time: float) -> bytes:
    """A line of FastChat's `model_answer/<model_id>.jsonl`."""
    answer = {
        "question_id": question.question_id,
        "answer_id": xxhash.xxh3_128_hexdigest(orjson.dumps([question.question_id, model_id, list(turns)])),
        "model_id": model_id,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time,
    }
    return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)


def lm_eval_commands(model: Path, dtype: str, on_cpu: bool, output: Path) -> list[str]:
    """A command line per number of shots, for this node's GPUs, over which `parallelize` splits the model, or for a
    CPU. Training sequences begin with the begin token, which lm-eval leaves out unless it is told."""
    place, device = ("", ["--device", "cpu"]) if on_cpu else (",parallelize=True", [])
    commands = []
    for shots in sorted({benchmark.shots for benchmark in BENCHMARKS}):
        tasks = ",".join(benchmark.task for benchmark in BENCHMARKS if benchmark.shots == shots)
        arguments = f"pretrained={model},dtype={dtype},add_bos_token=True{place}"
        argv = ["lm_eval", "--model", "hf", "--model_args", arguments, *device, "--tasks", tasks]
        argv += ["--num_fewshot", str(shots), "--batch_size", "auto", "--output_path", str(output)]
        commands.append(shlex.join(argv))
    return commands
