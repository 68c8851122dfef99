"""Seed data from OpenAssistant's message trees: prompts with their best reply (IFT) and with ranked replies (EFT).

A tree is used when it is ready for export and its root is an English prompt that passed review.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.conversations import flattened
from srlm_mega.data.quarantine import UserLines, text_field
from srlm_mega.data.seed_sets import SeedItem, SeedSets, draw_sets
from srlm_mega.records import Message, RankedReplies, RankedReply

SOURCE = "oasst"
LANGUAGE = "en"
READY = "ready_for_export"
ROLES = ("prompter", "assistant")
# Reasons to leave out a tree (by its state and its root), and a reply.
TREE_REASONS = ("not_ready", "not_english", "deleted", "unreviewed", "failed_review")
REPLY_REASONS = ("not_english", "deleted", "unreviewed", "failed_review", "unranked")


@dataclass(frozen=True)
class Tree:
    """One line of the export: its usable item, or the reason why it has none. `left_out` counts the replies of its
    usable conversations that are left out, by reason."""

    item: SeedItem | None
    reason: str | None
    left_out: Counter[str]


def read_oasst(section: SeedDataConfig, seed: int, quarantine: Path) -> SeedSets:
    """Draw the sets from the `*.trees.jsonl(.gz)` at `section.path`, one line in memory at a time. `eft_train` and
    `documents` stay empty: a model has to write the EFT examples, and there are no pre-training documents.

    Raise UserError when the sets cannot be filled, or for too many broken lines (see `UserLines`).
    """
    assert section.path is not None, "Config refuses seed_data.source=oasst without a path"
    lines = UserLines(section.path, partial(parse_tree, section.later_turns), quarantine, section.strip_template)
    left_out: Counter[str] = Counter()

    def counts() -> dict[str, int]:
        read = {"trees": lines.good, "bad_lines": lines.bad, "templated_lines": lines.templated}
        read |= {name: left_out[name] for name in TREE_REASONS}
        return read | {f"replies_{name}": left_out[f"replies_{name}"] for name in REPLY_REASONS}

    return draw_sets(usable_items(lines, left_out), section, SOURCE, seed, quarantine.parent, counts)


def usable_items(trees: Iterable[Tree], left_out: Counter[str]) -> Iterator[SeedItem]:
    """Yield the trees' usable items, and count in `left_out` what is left out."""
    for tree in trees:
        if tree.reason is not None:
            left_out[tree.reason] += 1
        left_out.update({f"replies_{reason}": count for reason, count in tree.left_out.items()})
        if tree.item is not None:
            yield tree.item


def parse_tree(later_turns: bool, number: int, fields: dict[str, Any]) -> Tree:
    """Parse one line of the export, with the ranked replies to later turns if `later_turns`. Raise ValueError when it
    is not a message tree: nothing of it is used then."""
    tree_id = text_field(fields, "message_tree_id")
    ready = text_field(fields, "tree_state") == READY
    root = fields.get("prompt")
    if not isinstance(root, dict):
        raise ValueError("the field `prompt` is missing or not a message")
    check_structure(root)
    reason = "not_ready" if not ready else unusable(root)
    if reason is not None:
        return Tree(None, reason, Counter())
    left_out: Counter[str] = Counter()
    first, *later = (RankedReplies(*turn) for turn in ranked_turns(tree_id, root, left_out))
    target = next((reply.text for reply in first.replies if reply.rank == 0), None)
    ranked = first if len(first.replies) > 1 else None
    ranked_later = tuple(turn for turn in later if later_turns and len(turn.replies) > 1)
    return Tree(SeedItem(tree_id, first.prompt, target, ranked, ranked_later), None, left_out)


def check_structure(root: dict[str, Any]) -> None:
    """Raise ValueError unless the messages form a tree of alternating roles: every reply names its parent, no message
    occurs twice, and the ranks of a message's replies are different integers."""
    seen: set[str] = set()
    open_messages: list[tuple[dict[str, Any], str | None, int]] = [(root, None, 0)]
    while open_messages:
        message, parent, depth = open_messages.pop()
        name = text_field(message, "message_id")
        if message.get("parent_id") != parent:
            raise ValueError(f"message {name} has the parent_id {message.get('parent_id')}, but is a reply to {parent}")
        if name in seen:
            raise ValueError(f"message {name} occurs twice: a cycle, or a copy")
        seen.add(name)
        role = ROLES[depth % 2]
        if message.get("role") != role:
            raise ValueError(f"message {name} has the role {message.get('role')!r}, expected {role}")
        replies = message.get("replies", [])
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise ValueError(f"the replies to message {name} are not a list of messages")
        if depth % 2 == 0:
            check_ranks(name, replies)
        open_messages += [(reply, name, depth + 1) for reply in replies]


def check_ranks(name: str, replies: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the ranks among the replies to a message are integers from 0, each used once."""
    ranks = [reply["rank"] for reply in replies if reply.get("rank") is not None]
    for rank in ranks:
        if type(rank) is not int or rank < 0:
            raise ValueError(f"a reply to message {name} has the rank {rank!r}, not an integer from 0")
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"replies to message {name} share a rank: {sorted(ranks)}")


def ranked_turns(
    tree_id: str, root: dict[str, Any], left_out: Counter[str]
) -> Iterator[tuple[str, str, tuple[RankedReply, ...]]]:
    """Yield each user turn of the usable conversations, the root first: its id, the conversation up to it as one text,
    and its usable ranked replies, best first. Count the other replies in `left_out`."""
    open_turns: list[tuple[dict[str, Any], tuple[Message, ...]]] = [(root, ())]
    while open_turns:
        message, before = open_turns.pop(0)
        conversation = (*before, Message("user", text_field(message, "text")))
        kept: list[RankedReply] = []
        for reply in message.get("replies", []):
            reason = unusable(reply)
            if reason is not None:
                left_out[reason] += 1
                continue
            text = text_field(reply, "text")
            if reply.get("rank") is None:
                left_out["unranked"] += 1
            else:
                kept.append(RankedReply(text, reply["rank"]))
            answered = (*conversation, Message("assistant", text))
            open_turns += [(turn, answered) for turn in reply.get("replies", []) if unusable(turn) is None]
        name = f"{SOURCE}-{tree_id}" if message is root else f"{SOURCE}-{tree_id}/{message['message_id']}"
        yield name, flattened(conversation), tuple(sorted(kept, key=lambda reply: reply.rank))


def unusable(message: dict[str, Any]) -> str | None:
    """Return the reason why a message is not used, None when it is. Some exports have `review_count` 0 everywhere."""
    if message.get("deleted", False) is not False:
        return "deleted"
    if text_field(message, "lang") != LANGUAGE:
        return "not_english"
    review = message.get("review_result")
    if review is None:
        return "unreviewed"
    return None if review is True else "failed_review"
