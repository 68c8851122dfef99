"""Formats of external evaluations: AlpacaEval 2's outputs, MT-Bench's answers, a command line of lm-eval.

They follow these projects' sources and were never tried with their judges: no key and no GPU was available.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
import xxhash

from srlm_mega.data.quarantine import json_object, text_field
from srlm_mega.errors import UserError
from srlm_mega.run.outside_data import entries

# FastChat's temperatures by category.
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
    """One of AlpacaEval's prompts, and the data set it comes from."""

    instruction: str
    dataset: str


@dataclass(frozen=True)
class AlpacaOutput:
    """An entry of AlpacaEval's `model_outputs`."""

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
        """Sampling temperature of the answer."""
        return MT_BENCH_TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper as a task of lm-eval. The number of shots is the Llama 2 paper's, whose numbers are the
    first row of the paper's table."""

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
    """Read AlpacaEval's set: a JSON list (`alpaca_eval.json`) or one object per line, each with `instruction` and
    optionally `dataset`. Raise UserError for an entry without instruction: the set is used as a whole or not at all."""

    def parse(fields: dict[str, Any]) -> AlpacaInstruction:
        text_field(fields, "instruction")
        return AlpacaInstruction(str(fields["instruction"]), str(fields.get("dataset", "")))

    return parsed(path, parse)


def read_mt_bench_questions(path: Path) -> list[MtBenchQuestion]:
    """Read FastChat's `question.jsonl`. Raise UserError with the first line that is not a question."""

    def parse(fields: dict[str, Any]) -> MtBenchQuestion:
        turns = fields.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError("`turns` is not a list of texts")
        if not isinstance(fields.get("question_id"), int | str):
            raise ValueError("`question_id` is neither an integer nor text")
        return MtBenchQuestion(fields["question_id"], str(fields.get("category", "")), tuple(turns))

    return parsed(path, parse)


def parsed(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Parse the entries of a file. Raise UserError with file and number for the first one that `parse` refuses, and
    when there is none."""
    found = []
    for entry in entries(path):
        try:
            fields = json_object(entry.content)
        except ValueError as error:
            raise UserError(f"{path} is neither a JSON list of objects nor JSON lines: {error}") from None
        try:
            found.append(parse(fields))
        except ValueError as error:
            raise UserError(f"{path}: entry {entry.place}: {error}") from None
    if not found:
        raise UserError(f"{path} is empty: it has no entry")
    return found


def alpaca_json(outputs: Sequence[AlpacaOutput]) -> bytes:
    """Return the content of a file for `alpaca_eval --model_outputs`."""
    return orjson.dumps(list(outputs), option=orjson.OPT_INDENT_2)


def mt_bench_line(question: MtBenchQuestion, model_id: str, turns: Sequence[str], time: float) -> bytes:
    """Return a line of FastChat's `model_answer/<model_id>.jsonl`; `time` is seconds since the epoch."""
    answer = {
        "question_id": question.question_id,
        "answer_id": xxhash.xxh3_128_hexdigest(orjson.dumps([question.question_id, model_id, list(turns)])),
        "model_id": model_id,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time,
    }
    return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)


def lm_eval_commands(model: Path, dtype: str, on_cpu: bool, output: Path) -> list[str]:
    """Return a command line per number of shots, for a CPU or for this node's GPUs, over which `parallelize` splits the
    model. `add_bos_token` is set because training sequences begin with it."""
    split, device = ("", ["--device", "cpu"]) if on_cpu else (",parallelize=True", [])
    commands = []
    for shots in sorted({benchmark.shots for benchmark in BENCHMARKS}):
        tasks = ",".join(benchmark.task for benchmark in BENCHMARKS if benchmark.shots == shots)
        arguments = f"pretrained={model},dtype={dtype},add_bos_token=True{split}"
        argv = ["lm_eval", "--model", "hf", "--model_args", arguments, *device, "--tasks", tasks]
        argv += ["--num_fewshot", str(shots), "--batch_size", "auto", "--output_path", str(output)]
        commands.append(shlex.join(argv))
    return commands
