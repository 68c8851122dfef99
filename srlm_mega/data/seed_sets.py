"""What a source of seed data gives: the sets that a run starts from."""

from collections.abc import Mapping
from dataclasses import dataclass

from srlm_mega.records import Prompt, RankedReplies, SftExample


@dataclass(frozen=True)
class SeedSets:
    """Disjoint sets; one that a source does not have is empty. `counts` says what became of the source's items."""

    ift: tuple[SftExample, ...]
    eft_train: tuple[SftExample, ...]
    eft_eval: tuple[RankedReplies, ...]
    validation: tuple[Prompt, ...]
    documents: tuple[SftExample, ...]
    counts: Mapping[str, int]
