"""Runs that nobody ran: outputs with real manifests and made-up content, small ones and one of a million candidates."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from places import TOY

from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.evaluation.results import EvaluationSample, JudgedPrompt, JudgeMetrics, ModelEvaluation
from srlm_mega.evaluation.win_rates import head_to_head_of
from srlm_mega.judging.pair_counts import PairCounts
from srlm_mega.judging.pairwise import Outcome
from srlm_mega.records import Candidate, Judgement, Message, PreferencePair, Prompt, write_jsonl
from srlm_mega.run.identity import config_of
from srlm_mega.run.manifest import Identity
from srlm_mega.run.plan import find_stage
from srlm_mega.run.run_dir import RunDir

HOSTILE = (
    "<script>alert(1)</script> \"'&<img src=x onerror=alert(2)> </p></article> {{ 7*7 }} \u202egnp.exe\u0000\u2028"
)
TEXT = "sure apple pear thanks"
QUALITY = (3.27, 4.28, 4.68, 4.75, 4.8, 4.82)
PROMPTS = 100  # held-out ones, of quality and of judging


class FakeRun:
    """Writes the outputs of a run's stages, with real manifests, from a random generator."""

    def __init__(
        self, root: Path, rounds: int = 2, ground_truth: bool = True, text: str = TEXT, overrides: Sequence[str] = ()
    ):
        self.folder = RunDir(root)
        self.random = random.Random(0)
        self.ground_truth, self.text = ground_truth, text
        root.mkdir(parents=True)
        self.config = load_config(TOY, [f"run.rounds={rounds}", *overrides])
        self.folder.config_file.write_text(to_yaml(self.config), encoding="utf-8")

    def commit(
        self,
        stage: str,
        files: Mapping[str, Iterable[object]],
        seconds: float,
        counts: dict[str, float] | None = None,
        num_rows: int | None = None,
    ) -> None:
        identity = Identity(stage, config_of(find_stage(self.config, stage), self.config), {})
        partial = self.folder.begin(identity, resumable=False)
        rows = [write_jsonl(partial / name, records) for name, records in files.items()]
        self.folder.commit(identity, rows[0] if num_rows is None else num_rows, seconds, "0.1.0", counts or {})

    def model(self, number: int) -> None:
        """M(number): its training curve and its evaluation."""
        steps: list[object] = [{"step": step, "loss": 2.0} for step in range(1, 101)]
        if number > 1:
            steps = [self.dpo_step(step) for step in range(1, 61)]
        counts, rows = ({"steps": 100, "excluded": 2}, 72) if number == 1 else ({}, 19)
        self.commit(f"M{number}", {"metrics.jsonl": steps}, 21.5, counts, rows)
        files: dict[str, list[Any]] = {
            "samples.jsonl": [self.sample(index, number) for index in range(PROMPTS)],
            "evaluation.json": [self.evaluation(number)],
            "judge_prompts.jsonl": [self.judged(index, number) for index in range(PROMPTS)],
        }
        self.commit(f"M{number}/evaluation", files, 4.0)

    def round(self, number: int) -> None:
        """Judgements, pairs and counts of round `number`."""
        prompts = [Prompt(f"r{number}-q{index}", self.prompt(index), "test") for index in range(30)]
        judgements = [self.judgement(index, number) for index in range(240)]
        counts = PairCounts(30, 20, 7, 0, 2, 1, 120, 115, 3, 2, 240, 4)
        candidates = [self.candidate(index, prompts[index // 4]) for index in range(120)]
        pairs = [self.pair(index, number) for index in range(20)]
        rates = [{"shard": 0, "requests/s": 7.0}, {"shards": 1, "requests/s": 8.5, "output_tokens/s/GPU": 1234.0}]
        self.commit(f"round_{number}/prompts", {"prompts.jsonl": prompts}, 1.25)
        self.commit(f"round_{number}/candidates", {"candidates.jsonl": candidates, "metrics.jsonl": rates}, 3.5)
        self.commit(f"round_{number}/judgements", {"judgements.jsonl": judgements}, 9.0)
        self.commit(f"round_{number}/pairs", {"pairs.jsonl": pairs}, 0.1, asdict(counts))

    def dpo_step(self, step: int) -> object:
        margin = 0.02 * step * self.random.uniform(0.7, 1.3)
        return {
            "step": step, "loss": math.log1p(math.exp(-margin)), "rewards/margins": margin, "rewards/accuracies": 0.75,
            "rewards/chosen": margin / 2, "rewards/rejected": -margin / 2, "grad_norm": 1.0, "step_seconds": 0.1 * step,
            "tokens/s/GPU": 1000.0, "memory/stage_0_peak_rss_GiB": 0.25, "memory/stage_1_peak_rss_GiB": 0.5,
        }  # fmt: skip

    def evaluation(self, number: int) -> ModelEvaluation:
        truth = QUALITY[number - 1] if self.ground_truth else None
        is_compared = self.ground_truth and number > 1
        outcomes = (0.66, 0.24, 0.10) if is_compared else (None, None, None)
        won: list[Outcome] = ["win" if index < 66 else "tie" if index < 90 else "loss" for index in range(PROMPTS)]
        against = head_to_head_of({f"v{index}": one for index, one in enumerate(won)}) if is_compared else None
        half = 0.8 + 0.015 * number
        judge = JudgeMetrics(
            half + 0.04, half, half - 0.05, 0.18, 0.6, 80, 0.3, 0.66, 0.6, 0.58, 0.55, 0.0, 1.0, 200, 190, 800, 2400
        )
        greedy = None if truth is None else truth + 0.15
        length = 7.5 + 0.2 * number
        return ModelEvaluation(f"M{number}", greedy, truth, *outcomes, judge, judge, length, against_m1=against)

    def judged(self, index: int, number: int) -> JudgedPrompt:
        """On average the evaluation's accuracy and tie rate; prompts are not equally easy for two models."""
        ease = (-2, 2)[(index >> (number > 1)) % 2]
        return JudgedPrompt(f"e{index}", judgements=3, pairs=200, right=142 + 3 * number + ease, tied=36)

    def sample(self, index: int, number: int) -> EvaluationSample:
        sampled_truth, greedy_truth = (
            int(mean) + (37 * index % PROMPTS < round(mean % 1 * PROMPTS)) if self.ground_truth else None
            for mean in (QUALITY[number - 1], QUALITY[number - 1] + 0.15)
        )
        sampled = self.text + " cat" * self.random.randint(0, number)
        return EvaluationSample(
            f"v{index}",
            f"list {index} animals lower open sure close thanks",
            self.text,
            sampled,
            greedy_truth,
            sampled_truth,
        )

    def prompt(self, index: int) -> str:
        return f"name {index} fruits upper open well close bye {self.text}"

    def candidate(self, index: int, prompt: Prompt) -> Candidate:
        name, text = f"{prompt.id}-c{index % 4}", f"{self.text} {index}"
        return Candidate(name, prompt.id, prompt.text, text, "stop", index, "0" * 32, (1,), (5,) * (index % 9 + 1))

    def judgement(self, index: int, number: int) -> Judgement:
        score = None if index % 60 == 59 else float(min(5, max(0, round(self.random.gauss(2.2 + number * 0.8, 1)))))
        text = f"relevant complete opened styled unclosed Score: {score} {self.text}"
        candidate = f"r{number}-q{index // 8}-c{index // 2 % 4}"
        return Judgement(f"{candidate}-j{index % 2}", candidate, text, score, "stop", index, "0" * 32)

    def pair(self, index: int, number: int) -> PreferencePair:
        chosen, rejected = Message("assistant", self.text), Message("assistant", f"{self.text} {index}")
        prompt = f"r{number}-q{index}"
        sides = (f"{prompt}-c0", f"{prompt}-c1", 4 + 1 / 3, 1.0)
        user = Message("user", self.prompt(index))
        return PreferencePair(f"{prompt}-pair", (user,), (chosen,), (rejected,), *sides, (1,), (5, 2), (6, 2))


def make_run(
    root: Path, rounds: int, ground_truth: bool = True, text: str = TEXT, overrides: Sequence[str] = ()
) -> Path:
    run = FakeRun(root, rounds, ground_truth, text, overrides)
    run.model(1)
    for number in range(1, rounds + 1):
        run.round(number)
        run.model(number + 1)
    return root


class BigRun(FakeRun):
    """One round of very many candidates, one judgement each, written as they are made."""

    def big_round(self, num_prompts: int, per_prompt: int = 4) -> None:
        """Prompts, candidates, judgements, pairs."""
        words = ["".join(self.random.choices("abcdefghijklmnop", k=self.random.randint(2, 9))) for _ in range(3000)]
        self.sentences = [" ".join(self.random.choices(words, k=14)) for _ in range(5000)]
        total = num_prompts * per_prompt
        counts = PairCounts(num_prompts, num_prompts, 0, 0, 0, 0, total, total, 0, 0, total, 0)
        prompts = [f"r1-p{index:06d}" for index in range(num_prompts)]
        ids = [(prompt, f"{prompt}-c{copy}") for prompt in prompts for copy in range(per_prompt)]
        self.commit("round_1/prompts", {"prompts.jsonl": (Prompt(one, self.words(1), "test") for one in prompts)}, 60.0)
        self.commit("round_1/candidates", {"candidates.jsonl": self.big_candidates(ids)}, 3000.0)
        judgements = (
            Judgement(f"{one}-j0", one, f"{self.words(2)} Score: 3", float(number % 6), "stop", 0, "0" * 32)
            for number, (_, one) in enumerate(ids)
        )
        self.commit("round_1/judgements", {"judgements.jsonl": judgements}, 9000.0)
        pairs = (self.big_pair(prompt) for prompt in prompts)
        self.commit("round_1/pairs", {"pairs.jsonl": pairs}, 20.0, asdict(counts))

    def words(self, sentences: int) -> str:
        return " ".join(self.random.choices(self.sentences, k=sentences))

    def big_candidates(self, ids: Sequence[tuple[str, str]]) -> Iterator[Candidate]:
        for prompt, name in ids:
            length = self.random.randint(5, 60)
            yield Candidate(name, prompt, "a prompt", self.words(4), "stop", 0, "0" * 32, (1,), tuple(range(length)))

    def big_pair(self, prompt: str) -> PreferencePair:
        sides = (f"{prompt}-c0", f"{prompt}-c1", 5.0, 1.0)
        return PreferencePair(f"{prompt}-pair", (), (), (), *sides, (1,), (2,), (2,))
