"""The lineage explorer's data: an index and pages of prompts, each gzipped JSON in base64.

The browser unpacks the index when the page opens and a page when one of its prompts is looked at. Base64 has no
character that HTML could take for its own, so whatever a model wrote, the page's structure stands.
"""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from srlm_mega.report.lineage_sample import CandidateNode, LineageSample, PromptTree
from srlm_mega.report.round_parts import RoundPart
from srlm_mega.report.text import shortened

PROMPTS_PER_PAGE = 50
PACKED_BYTES = 13 * 2**20  # of base64; everything else in the page takes 1 to 2 MiB
INDEX_CHARACTERS = 160


@dataclass(frozen=True)
class Explorer:
    """`index` and `pages` as they stand in the HTML; `shown` of `total` prompts are in them."""

    index: str
    pages: tuple[str, ...]
    shown: int
    total: int


def explorer(rounds: Sequence[RoundPart]) -> Explorer | None:
    """All kept prompts of all rounds, fewer where they do not fit; None when there are none."""
    while True:
        found = packed(rounds)
        if found is None or len(found.index) + sum(map(len, found.pages)) <= PACKED_BYTES:
            return found
        for part in rounds:
            part.lineage.thin()


def packed(rounds: Sequence[RoundPart]) -> Explorer | None:
    """The data of all prompts that are kept."""
    rows = [(part, tree) for part in rounds for tree in part.trees if tree.candidates]
    if not rows:
        return None
    index = [
        {
            "round": part.number,
            "id": tree.id,
            "text": shortened(" ".join(tree.text.split()), INDEX_CHARACTERS),
            "outcome": tree.outcome(part.is_paired),
        }
        for part, tree in rows
    ]
    trees = [tree_json(tree) for _, tree in rows]
    pages = tuple(in_html(trees[first : first + PROMPTS_PER_PAGE]) for first in range(0, len(trees), PROMPTS_PER_PAGE))
    samples: list[LineageSample] = [part.lineage for part in rounds]
    return Explorer(in_html(index), pages, len(rows), sum(sample.total for sample in samples))


def tree_json(tree: PromptTree) -> dict[str, Any]:
    """What report.js shows of one prompt; candidates from best to worst, those without a score last."""
    roles = {} if tree.pair is None else {tree.pair.chosen_id: "chosen", tree.pair.rejected_id: "rejected"}

    def goodness(one: CandidateNode) -> tuple[float, int]:
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
            for one in sorted(tree.candidates.values(), key=goodness, reverse=True)
        ],
    }


def in_html(content: Any) -> str:
    """JSON, gzipped (without a date: the same content gives the same bytes), in base64."""
    return base64.b64encode(gzip.compress(orjson.dumps(content), 6, mtime=0)).decode()
