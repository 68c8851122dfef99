"""Data of the lineage explorer: an index and pages of prompts, each gzipped JSON in base64.

The browser unpacks the index when the page opens, and a page of prompts when one of them is selected. Base64 has no
character with a meaning in HTML, so no text of a model can change the page's structure.
"""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from srlm_mega.report.lineage_sample import CandidateNode, PromptTree
from srlm_mega.report.round_parts import RoundPart
from srlm_mega.text import shortened

PROMPTS_PER_PAGE = 50
MAX_BYTES = 13 * 2**20  # of base64; everything else in the page takes 1 to 2 MiB
INDEX_CHARACTERS = 160


@dataclass(frozen=True)
class Explorer:
    """Encoded `index` and `pages`, with `shown` of `total` prompts."""

    index: str
    pages: tuple[str, ...]
    shown: int
    total: int


def explorer(rounds: Sequence[RoundPart]) -> Explorer | None:
    """Encode all kept prompts of all rounds, or fewer if they do not fit; None when there are none."""
    while True:
        found = encoded(rounds)
        if found is None or len(found.index) + sum(map(len, found.pages)) <= MAX_BYTES:
            return found
        for part in rounds:
            part.lineage.halve()


def encoded(rounds: Sequence[RoundPart]) -> Explorer | None:
    """Encode all prompts that are kept; None when there are none."""
    rows = [(part, tree) for part in rounds for tree in part.lineage.trees if tree.candidates]
    if not rows:
        return None
    index = [
        {
            "round": part.number,
            "id": tree.id,
            "text": shortened(" ".join(tree.text.split()), INDEX_CHARACTERS),
            "outcome": tree.outcome(paired=bool(part.counts)),
        }
        for part, tree in rows
    ]
    trees = [tree_json(tree) for _, tree in rows]
    pages = tuple(base64_json(trees[at : at + PROMPTS_PER_PAGE]) for at in range(0, len(trees), PROMPTS_PER_PAGE))
    return Explorer(base64_json(index), pages, len(rows), sum(part.lineage.total for part in rounds))


def tree_json(tree: PromptTree) -> dict[str, Any]:
    """Return one prompt for report.js, its candidates from best to worst, those without a score last."""
    roles = {} if tree.pair is None else {tree.pair.chosen_id: "chosen", tree.pair.rejected_id: "rejected"}

    def sort_key(one: CandidateNode) -> tuple[float, int]:
        return -1.0 if one.score is None else one.score, {"chosen": 2, "rejected": 0}.get(roles.get(one.id, ""), 1)

    return {
        "text": tree.text,
        "pair": None if tree.pair is None else tree.pair.id,
        "candidates": [
            {
                "id": one.id,
                "role": roles.get(one.id, ""),
                "score": one.score,
                "tokens": one.tokens,
                "finish": one.finish_reason,
                "text": one.text,
                "judgements": [{"score": leaf.score, "text": leaf.text} for leaf in one.judgements],
            }
            for one in sorted(tree.candidates.values(), key=sort_key, reverse=True)
        ],
    }


def base64_json(content: Any) -> str:
    """Return content as gzipped JSON in base64. The gzip header has no date: the same content gives the same bytes."""
    return base64.b64encode(gzip.compress(orjson.dumps(content), 6, mtime=0)).decode()
