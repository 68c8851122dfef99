"""The ground truth of the toy world as a pairwise judge, for the head-to-head of a demo's models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.data.toy_world.truth import quality
from srlm_mega.data.toy_world.world import parse_instruction
from srlm_mega.records import Decoding, Prompt, write_jsonl
from srlm_mega.run.files import write_durably
from srlm_mega.sampling.sampling_rate import ProgressCallback
from srlm_mega.stages.compare_responses import Match
from srlm_mega.stages.pairwise_judge import PairwiseQuestion, judgement_of
from srlm_mega.stages.sampling_task import CompletionFields

GROUND_TRUTH = "ground truth"


def truth_is_known(config: Config, prompts: Sequence[Prompt]) -> bool:
    """Tell whether a run is of the toy world, and all prompts are instructions of this world."""
    in_toy_world = config.seed_data.source == "toy_world"
    return in_toy_world and all(parse_instruction(prompt.question) is not None for prompt in prompts)


@dataclass(frozen=True)
class TruthJudge:
    """A `PairwiseJudge` that prefers the response that meets more of the toy world's five criteria."""

    matches: Mapping[str, Match]
    name: str = GROUND_TRUTH

    @classmethod
    def of(cls, matches: Sequence[Match], questions: int) -> "TruthJudge":
        """Return the judge of these matches."""
        return cls({match.prompt_id: match for match in matches})

    def fits(self, text: str) -> bool:
        """Return True: it reads no question."""
        return True

    def judge(self, questions: Sequence[PairwiseQuestion], file: Path, on_progress: ProgressCallback) -> None:
        """Answer all questions as `PairwiseJudge.judge` specifies."""
        records = (judgement_of(question, self._answer(question)) for question in questions)
        write_durably(file, partial(write_jsonl, records=records))
        on_progress(len(questions), len(questions), "")

    def close(self) -> None:
        """Do nothing: nothing is loaded."""

    def _answer(self, question: PairwiseQuestion) -> CompletionFields:
        match = self.matches[question.prompt_id]
        both = quality(match.prompt, match.ours), quality(match.prompt, match.theirs)
        first, second = both if question.ours_first else both[::-1]
        verdict = "tie" if first == second else "A" if first > second else "B"
        return {
            "text": f"criteria met of five: A {first}, B {second}. Verdict: {verdict}",
            "finish_reason": "stop",
            "seed": 0,
            "model_hash": self.name,
            "token_ids": (),
            "decoding": Decoding(0.0, 1.0, 0),
        }
