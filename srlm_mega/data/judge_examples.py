"""A user's own examples of judging, in place of EFT that is built: a JSONL of judge's turns and answers as they are
(`messages`; `prompt` and `completion`), or of judged responses (`instruction`, `response`, `score` and, if there is
one, `rationale`), which the run's judge template turns into both."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.conversations import CONVERSATIONS, question_in
from srlm_mega.data.eft_selection import sample_in_order
from srlm_mega.data.formats import ANSWERS, SFT_DIALECTS, SOURCE, answer_to, keys, line_name, parse_example
from srlm_mega.data.quarantine import UserLines, optional_text
from srlm_mega.data.rouge import RougePool, normalised
from srlm_mega.data.seed_sets import SeedSets
from srlm_mega.judging.scores import MAX_SCORE, parse_score
from srlm_mega.judging.template import JudgeTemplate
from srlm_mega.records import SftExample, one_text

SCORE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?: *(?:/|out of) *([0-9]+))?")
QUOTED = 40  # characters of an answer that a message shows


def with_judge_examples(
    sets: SeedSets,
    section: SeedDataConfig,
    template: JudgeTemplate,
    seed: int,
    quarantine: Path,
    most: float = MAX_SCORE,
) -> SeedSets:
    """Return the sets with EFT from the file at `section.eft_path`: of the examples whose instruction is not that of a
    held-out prompt, nor similar to one, a seeded sample of at most `section.num_eft`.

    Raise UserError for too many broken lines (see `UserLines`).
    """
    path = section.eft_path
    assert path is not None, "the caller has a file of judge examples"
    lines = UserLines(path, partial(parse_judge_example, template, path, most=most), quarantine, section.strip_template)
    held_out = [one.prompt for one in sets.eft_eval] + [one.text for one in (*sets.validation, *sets.test)]
    # The toy world's instructions are all alike: its own sets are only kept from having the same ones.
    alike = RougePool(1.0 if section.source == "toy_world" else section.near_duplicate_rouge_l, held_out)
    same = set(map(normalised, held_out))

    def is_held_out(example: SftExample) -> bool:
        asked = template.instruction_in(example.prompt) or example.prompt
        return normalised(asked) in same or alike.has_similar(asked)

    usable = [one for one in lines if not is_held_out(one)]
    drawn = [usable[index] for index in sample_in_order(range(len(usable)), section.num_eft, seed)]
    counts = {
        "judge_examples": lines.good,
        "bad_judge_examples": lines.bad,
        "judge_examples_held_out": lines.good - len(usable),
        "judge_examples_used": len(drawn),
    }
    return replace(sets, eft_train=tuple(drawn), counts={**sets.counts, **counts})


def parse_judge_example(
    template: JudgeTemplate, path: Path, number: int, fields: dict[str, Any], most: float = MAX_SCORE
) -> SftExample:
    """Parse a line. Raise ValueError when it is in no known form, or its answer has no score from 0 to `most`."""
    is_judged = "response" in fields and not {"prompt", "completion"} <= fields.keys()
    asked = question_in(fields) if is_judged else None
    if asked is not None:
        prompt = template.fill(one_text(asked.prompt, asked.system), answer_to(asked, fields, "response"))
        completion, system = template.judgement(score_field(fields, most), optional_text(fields, "rationale")), ""
    elif any(name in fields for name in (*CONVERSATIONS, *ANSWERS)):
        item = parse_example(path, number, fields)
        assert item.target is not None, "a supervised example has a target"
        prompt, completion, system = item.prompt, item.target, item.system
    else:
        wanted = f"{SFT_DIALECTS}; or a question with `response` and `score`"
        raise ValueError(f"not an example of judging: it needs {wanted}; it has {keys(fields)}")
    if parse_score(completion, most) is None:
        raise ValueError(
            f"no `Score: x` from 0 to {most:g} can be read in its answer, which ends in {completion[-QUOTED:]!r}"
        )
    return SftExample(f"eft-{line_name(path, number)}", "eft", prompt, completion, SOURCE, system)


def score_field(fields: dict[str, Any], most: float) -> float:
    """Return a score from 0 to `most`: a number, or text such as `4` and `4/5`. Raise ValueError for anything else."""
    value = fields.get("score")
    written = SCORE.fullmatch(value.strip()) if isinstance(value, str) else None
    is_whole = written is not None and (written[2] is None or float(written[2]) == most)
    score: Any = float(written[1]) if written is not None and is_whole else value
    if type(score) not in (int, float) or not 0 <= score <= most:
        raise ValueError(f"the field `score` is {value!r}, not a number from 0 to {most:g}")
    return float(score)
