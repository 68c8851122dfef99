"""Warnings on data that repeat themselves more than their owner may know."""

from collections.abc import Mapping

LARGE_SHARE = 0.2
DRAWN = ("eft_eval_prompts", "validation", "test", "eft_sources", "ift")
REPEATED = "an earlier one is the same, of which the first counts"
ALIKE = (
    "they are like one that was drawn (ROUGE-L F1 above seed_data.near_duplicate_rouge_l). If these are different "
    "questions, raise it: 1 leaves out copies alone"
)


def warnings_on(counts: Mapping[str, float]) -> list[str]:
    """Return warnings on the counts of a finished stage, where a large share was left out as repeated."""
    drawn = sum(counts.get(name, 0) for name in DRAWN)
    shares = (
        (counts.get("duplicate_texts", 0), counts.get("usable", 0), REPEATED),
        (counts.get("near_duplicates", 0), drawn, ALIKE),
    )
    return [
        f"warning: {left_out:,g} of {left_out + kept:,g} prompts were left out because {why}"
        for left_out, kept, why in shares
        if left_out > LARGE_SHARE * (left_out + kept)
    ]
