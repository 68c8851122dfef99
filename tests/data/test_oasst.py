"""Seed data from OpenAssistant trees: what is kept, what is left out and why, what is held out, what is counted."""

import gzip
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.oasst import Tree, parse_tree, read_oasst
from srlm_mega.data.quarantine import BadLine, UserLines
from srlm_mega.data.rouge import normalised
from srlm_mega.data.seed_sets import SeedSets
from srlm_mega.errors import UserError
from srlm_mega.records import read_jsonl

SAMPLE = "oasst_sample.trees.jsonl"
Message = dict[str, Any]


def message(name: str, role: str, text: str, replies: list[Message], **changes: Any) -> Message:
    """A message whose replies name it as their parent."""
    for reply in replies:
        reply.setdefault("parent_id", name)
    fields = {"lang": "en", "deleted": False, "review_result": True, "review_count": 0, "replies": replies}
    return {"message_id": name, "role": role, "text": text} | fields | changes


def reply(name: str, rank: int | None, *later: Message, **changes: Any) -> Message:
    return message(name, "assistant", f"reply {name}", list(later), rank=rank, **changes)


def tree(name: str, replies: list[Message] | None = None, state: str = "ready_for_export", **root: Any) -> Message:
    """Three ranked replies to a question of which no two are alike, where nothing else is said."""
    ranked = [reply(f"{name}-{rank}", rank) for rank in range(3)] if replies is None else replies
    prompt = message(name, "prompter", question(name), ranked) | root
    return {"message_tree_id": name, "tree_state": state, "prompt": prompt}


def question(name: str) -> str:
    return " ".join(f"{name}{part}" for part in ("what", "is", "this", "about"))


def write(path: Path, lines: list[Message | bytes]) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else orjson.dumps(line) for line in lines))
    return path


def draw(path: Path, trees: list[Message | bytes], seed: int = 0, **counts: Any) -> SeedSets:
    """The sets from these trees, small held-out ones where nothing else is said."""
    sizes = {"num_ift": 100, "num_eft_eval": 3, "num_validation": 1} | counts
    section = SeedDataConfig(source="oasst", path=write(path, trees), **sizes)
    return read_oasst(section, seed, path.with_name("bad.jsonl"))


def parse(fields: Message) -> Tree:
    return parse_tree(True, 1, fields)


def test_the_best_reply_is_the_target_and_the_ranking_is_held_out(tmp_path: Path) -> None:
    seed = draw(tmp_path / "t.jsonl", [tree(f"t{number}") for number in range(5)])
    assert len(seed.ift) == 3
    for example in seed.ift:
        name = example.id.removeprefix("oasst-")
        assert (example.kind, example.prompt, example.completion) == ("ift", question(name), f"reply {name}-0")
    (ranked,) = seed.eft_eval
    assert [one.rank for one in ranked.replies] == [0, 1, 2]


def conversation(name: str) -> Message:
    """Two usable turns after the first one, one of them below a reply of rank 1, and what is not usable."""
    return tree(
        name,
        [
            reply(
                f"{name}-a",
                0,
                message(f"{name}-u1", "prompter", "and then", [reply(f"{name}-c", 1), reply(f"{name}-d", 0)]),
                message(f"{name}-u2", "prompter", "und", [reply(f"{name}-e", 0), reply(f"{name}-f", 1)], lang="de"),
            ),
            reply(f"{name}-b", 1, message(f"{name}-u3", "prompter", "why", [reply(f"{name}-g", 0)])),
        ],
    )


def test_later_turns_are_flattened_into_the_question() -> None:
    item = parse(conversation("t")).item
    assert item is not None and item.target == "reply t-a"
    first, second = item.ranked  # below u2 nothing is English, below u3 there is one reply: no ranking
    assert (first.prompt, [one.text for one in first.replies]) == (question("t"), ["reply t-a", "reply t-b"])
    assert second.prompt == f"User: {question('t')}\n\nAssistant: reply t-a\n\nUser: and then"
    assert [(one.text, one.rank) for one in second.replies] == [("reply t-d", 0), ("reply t-c", 1)]
    alone = parse_tree(False, 1, conversation("t")).item
    assert alone is not None and alone.ranked == (first,)


def test_a_reply_that_cannot_be_used_is_left_out_and_counted() -> None:
    replies = [
        reply("a", 0, deleted=True),
        reply("b", 2),
        reply("c", 1),
        reply("d", 3, review_result=False),
        reply("e", None),
        reply("f", 4, lang="de"),
        reply("g", 5, review_result=None),
    ]
    parsed = parse(tree("t", replies))
    assert parsed.item is not None
    (ranked,) = parsed.item.ranked
    assert [(one.text, one.rank) for one in ranked.replies] == [("reply c", 1), ("reply b", 2)]
    assert parsed.item.target is None, "the best usable reply is not the best reply"
    assert parsed.left_out == {"deleted": 1, "failed_review": 1, "unranked": 1, "not_english": 1, "unreviewed": 1}


def cyclic() -> Message:
    inner = message("x", "prompter", "again", [])
    return tree("x", [reply("x-0", 0, inner)])


BROKEN = {
    "half-finished": (orjson.dumps(tree("half"))[:200], "not JSON"),
    "not UTF-8": (orjson.dumps(tree("latin")).replace(b"what", b"caf\xe9"), "not UTF-8"),
    "no tree": ({"message_tree_id": "n", "tree_state": "growing", "prompt": None}, "`prompt` is missing"),
    "reply without a parent": (tree("p", [reply("p-0", 0) | {"parent_id": None}]), "has the parent_id None, but"),
    "reply of another parent": (tree("o", [reply("o-0", 0) | {"parent_id": "else"}]), "has the parent_id else, but"),
    "root with a parent": (tree("q", parent_id="else"), "has the parent_id else, but is a reply to None"),
    "cycle": (cyclic(), "message x occurs twice"),
    "negative rank": (tree("r", [reply("r-0", -1)]), "rank -1"),
    "rank as text": (tree("s", [reply("s-0", 0) | {"rank": "0"}]), "rank '0'"),
    "shared rank": (tree("u", [reply("u-0", 0), reply("u-1", 0)]), r"share a rank: [0, 0]"),
    "wrong role": (tree("v", [message("v-0", "prompter", "hm", [])]), "expected assistant"),
    "no language": (tree("w", lang=None), "`lang` is NoneType"),
}


def fixture() -> list[Message | bytes]:
    """1,300 trees of which 1,200 are plain, 30 are conversations, and the others are not usable; and broken lines."""
    trees: list[Message | bytes] = [tree(f"plain{number}") for number in range(1200)]
    trees += [conversation(f"talk{number}") for number in range(30)]
    trees += [tree(f"single{number}", [reply(f"single{number}-0", 0)]) for number in range(10)]
    trees += [tree(f"unranked{number}", [reply(f"unranked{number}-0", None)]) for number in range(5)]
    trees += [tree(f"beheaded{number}", [reply(f"beheaded{number}-{r}", r, deleted=r == 0) for r in range(3)])
              for number in range(4)]  # fmt: skip
    trees += [tree(f"de{number}", lang="de") for number in range(11)]
    trees += [tree(f"deleted{number}", deleted=True) for number in range(9)]
    trees += [tree(f"open{number}", review_result=None) for number in range(8)]
    trees += [tree(f"failed{number}", review_result=False) for number in range(7)]
    trees += [tree(f"growing{number}", state="growing") for number in range(6)]
    trees += [tree("plain7"), tree("plain8", text="another text")]  # the tree again
    trees += [tree(f"copy{n}", text=f"  {question(f'plain{n}').upper()}?! ") for n in range(3)]  # the text again
    for place, (line, _) in enumerate(BROKEN.values()):
        trees.insert(100 * place, line)
    return trees


def elsewhere(seed: SeedSets) -> set[str]:
    """The trees that are in other sets than IFT."""
    drawn = [one.id for one in (*seed.eft_eval, *seed.eft_sources, *seed.validation, *seed.test)]
    return {name.removeprefix("oasst-").partition("/")[0] for name in drawn}


def test_a_file_with_everything_that_can_be_wrong_gives_exactly_what_is_right(tmp_path: Path) -> None:
    counts = {"num_ift": 700, "num_eft_eval": 30, "num_validation": 20, "num_test": 10, "num_eft_sources": 200}
    seed = draw(tmp_path / "t.jsonl", fixture(), **counts)
    assert seed.counts == {
        "trees": 1295,
        "bad_lines": 12,
        "templated_lines": 0,
        "not_ready": 6,
        "not_english": 11,
        "deleted": 9,
        "unreviewed": 8,
        "failed_review": 7,
        "replies_not_english": 0,
        "replies_deleted": 4,
        "replies_unreviewed": 0,
        "replies_failed_review": 0,
        "replies_unranked": 5,
        "duplicate_ids": 2,
        "duplicate_texts": 3,
        "merged": 0,
        "usable": 1249,  # 1200 + 30 + 10 + 5 + 4
        "with_target": 1240,
        "with_ranking": 1234,  # 1200 + 30, and 4 that lost their best
        "with_later_ranking": 30,
        "near_duplicates": 0,
        "eft_eval_prompts": len(seed.eft_eval),
        "eft_eval_items": 30,
        "validation": 20,
        "test": 10,
        "eft_sources": 200,
        "ift_available": 1240 - sum(not name.startswith(("unranked", "beheaded")) for name in elsewhere(seed)),
        "ift": 700,
    }
    assert all(example.prompt == question(example.id.removeprefix("oasst-")) for example in seed.ift)
    unfit = ("unranked", "beheaded", "de", "deleted", "open", "failed", "growing", "copy")
    assert not any(example.id.removeprefix("oasst-").startswith(unfit) for example in seed.ift)
    assert any("/" in one.id for one in seed.eft_sources), "later turns are among the sources of EFT"
    bad = {line.reason for line in read_jsonl(tmp_path / "bad.jsonl", BadLine)}
    for kind, (_, reason) in BROKEN.items():
        assert sum(reason in said for said in bad) >= 1, kind
    assert len(bad) == len(BROKEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "t.jsonl"]


def test_the_sets_share_no_tree_and_no_text(tmp_path: Path) -> None:
    trees: list[Message | bytes] = [conversation(f"t{number}") for number in range(60)]
    seed = draw(tmp_path / "t.jsonl", trees, num_eft_eval=20, num_validation=10, num_test=5, num_eft_sources=30)
    sets = {
        "ift": [(one.id, one.prompt) for one in seed.ift],
        "eft": [(one.id.partition("/")[0], one.prompt) for one in seed.eft_sources],
        "eval": [(one.id, one.prompt) for one in seed.eft_eval],
        "validation": [(one.id, one.text) for one in seed.validation],
        "test": [(one.id, one.text) for one in seed.test],
    }
    assert {name: len(drawn) for name, drawn in sets.items()} == {
        "ift": 20,
        "eft": 30,
        "eval": 10,
        "validation": 10,
        "test": 5,
    }
    trees_of = {name: {tree_id for tree_id, _ in drawn} for name, drawn in sets.items()}
    assert sum(map(len, trees_of.values())) == len(set.union(*trees_of.values())) == 60
    texts_of = {name: {normalised(text) for _, text in drawn} for name, drawn in sets.items()}
    assert sum(map(len, texts_of.values())) == len(set.union(*texts_of.values()))


def test_a_near_duplicate_is_passed_over_whatever_set_it_would_be_in(tmp_path: Path) -> None:
    """9 of 10 words in common order: F1 = 0.9."""
    alike = " ".join(f"word{number}" for number in range(9))
    trees: list[Message | bytes] = [tree(f"t{number}", text=f"{alike} {number}") for number in range(30)]
    trees += [tree(f"u{number}") for number in range(4)]
    seed = draw(tmp_path / "t.jsonl", trees)
    drawn = [*seed.ift, *seed.eft_eval]
    assert sum(one.prompt.startswith("word0") for one in drawn) + seed.validation[0].text.startswith("word0") == 1
    assert seed.counts["near_duplicates"] == 29
    loose = draw(tmp_path / "t.jsonl", trees, near_duplicate_rouge_l=0.9)
    assert loose.counts["near_duplicates"] == 0 and len(loose.ift) == 32


def test_the_draw_is_seeded_limited_and_blind_to_the_order_of_the_file(tmp_path: Path) -> None:
    trees: list[Message | bytes] = [tree(f"t{number}") for number in range(40)]
    first, again, other = (draw(tmp_path / "t.jsonl", trees, seed=seed, num_ift=20) for seed in (1, 1, 2))
    assert first == again
    assert first.ift != other.ift
    assert len(first.ift) == 20 and first.counts["ift_available"] == 38
    assert draw(tmp_path / "t.jsonl", trees[::-1], seed=1, num_ift=20) == first


def test_the_evaluated_replies_fill_their_number_as_far_as_their_sets_allow(tmp_path: Path) -> None:
    trees: list[Message | bytes] = [tree(f"t{number}") for number in range(20)]
    assert draw(tmp_path / "t.jsonl", trees, num_eft_eval=11).counts["eft_eval_items"] == 9  # sets of 3
    trees.append(tree("pair", [reply("pair-0", 0), reply("pair-1", 1)]))
    assert draw(tmp_path / "t.jsonl", trees, num_eft_eval=11).counts["eft_eval_items"] == 11


@pytest.mark.parametrize("sizes", [{"num_validation": 3}, {"num_eft_eval": 12}, {"num_test": 3}])
def test_too_few_trees_say_what_to_lower(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"3 usable prompts, 3 of them with ranked .* seed_data.num_validation="):
        draw(tmp_path / "t.jsonl", [tree(f"t{number}") for number in range(3)], **sizes)


def test_too_few_trees_say_what_was_left_out(tmp_path: Path) -> None:
    trees: list[Message | bytes] = [tree(f"t{number}") for number in range(3)]
    trees += [tree(f"de{number}", lang="de") for number in range(5)]
    trees += [tree(f"u{number}", [reply(f"u{number}-{rank}", None) for rank in range(2)]) for number in range(2)]
    with pytest.raises(UserError) as error:
        draw(tmp_path / "t.jsonl", [*trees, tree("t1")], num_eft_eval=99)
    assert "left out: trees that are not English: 5; replies without a rank: 4; repeated trees: 1\n" in str(error.value)
    assert orjson.loads((tmp_path / "counts.json").read_bytes())["not_english"] == 5


def test_gzip_gives_the_same(tmp_path: Path) -> None:
    trees: list[Message | bytes] = [tree(f"t{number}") for number in range(9)]
    plain = draw(tmp_path / "t.jsonl", trees)
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    section = SeedDataConfig(source="oasst", path=packed, num_ift=100, num_eft_eval=3, num_validation=1)
    assert read_oasst(section, 0, tmp_path / "bad.jsonl") == plain


def test_normalised_texts_without_letters_stay_apart() -> None:
    assert normalised("???") != normalised("!!!")
    assert normalised("What's  UP?") == normalised("what s up")


def test_the_real_sample(shared_data: Path, tmp_path: Path) -> None:
    """43 of the 60 trees have ranked replies to a later turn."""
    section = SeedDataConfig(
        source="oasst", path=shared_data / SAMPLE, num_eft_eval=24, num_validation=10, num_test=5, num_eft_sources=40
    )
    seed = read_oasst(section, 0, tmp_path / "bad.jsonl")
    assert seed.counts["usable"] == seed.counts["with_ranking"] == seed.counts["with_target"] == 60
    assert seed.counts["with_later_ranking"] == 43 and seed.counts["eft_eval_items"] in (23, 24)
    assert (len(seed.validation), len(seed.test), len(seed.eft_sources)) == (10, 5, 40)
    taken = {one.id.partition("/")[0] for one in seed.eft_sources}
    assert len(seed.ift) == 60 - 10 - 5 - len(seed.eft_eval) - len(taken)
    assert all(len(item.replies) >= 2 and item.replies[0].rank == 0 for item in seed.eft_eval)


def test_the_real_sample_with_a_broken_line_stops(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    lines = (shared_data / SAMPLE).read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:6], lines[6][:300], *lines[7:]]))
    with pytest.raises(UserError, match=r"1 of the 60 lines .* line 7: not JSON"):
        read_oasst(SeedDataConfig(source="oasst", path=path), 0, tmp_path / "bad.jsonl")


def large_trees(path: Path) -> Path:
    """60 MB of trees in a small file: three replies of 100,000 characters each."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number in range(200):
            replies = [reply(f"t{number}-{rank}", rank) | {"text": "much " * 20_000} for rank in range(3)]
            file.write(orjson.dumps(tree(f"t{number}", replies), option=orjson.OPT_APPEND_NEWLINE))
    return path


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that Python objects took while this ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path, bad = large_trees(tmp_path / "t.jsonl.gz"), tmp_path / "bad.jsonl"
    section = SeedDataConfig(source="oasst", path=path, num_ift=5, num_eft_eval=6, num_validation=5)
    assert peak_bytes(lambda: read_oasst(section, 0, bad)) < 10e6
    assert peak_bytes(lambda: list(UserLines(path, partial(parse_tree, True), bad))) > 50e6, (
        "the bound would hold anyway"
    )


def test_broken_lines_are_not_kept_in_memory_either(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(b"{" + b"much " * 20_000 for _ in range(300)))

    def read() -> None:
        with pytest.raises(UserError, match="300 of the 300 lines"):
            list(UserLines(path, partial(parse_tree, True), tmp_path / "bad.jsonl"))

    assert peak_bytes(read) < 5e6 < path.stat().st_size
    assert (tmp_path / "bad.jsonl").stat().st_size > path.stat().st_size
