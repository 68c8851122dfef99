"""The demo's real text: read without a bad line, no question twice, and ranks that length does not give away."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import correlation
from typing import Any

import orjson
import pytest
from places import CONFIGS, ROOT

from srlm_mega.config.file import load_config
from srlm_mega.data.formats import parse_example, parse_ranking, read_jsonl_sets
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.data.quarantine import UserLines
from srlm_mega.data.rouge import RougePool, rouge_words
from srlm_mega.data.seed_sets import SeedItem

FOLDER = ROOT / "launch/data/real_text"
PRESET = CONFIGS / "smollm2_cpu.yaml"
WORDS_IN_A_ROW = 7


@pytest.fixture
def examples(tmp_path: Path) -> list[SeedItem]:
    path = FOLDER / "ift.jsonl"
    return list(UserLines(path, partial(parse_example, path), tmp_path / "bad_ift.jsonl"))


@pytest.fixture
def rankings(tmp_path: Path) -> list[SeedItem]:
    path = FOLDER / "ranked.jsonl"
    return list(UserLines(path, partial(parse_ranking, path), tmp_path / "bad_ranked.jsonl"))


@pytest.fixture
def questions(examples: list[SeedItem], rankings: list[SeedItem], tmp_path: Path) -> list[str]:
    """The prompts of all three files."""
    prompts = read_prompts(FOLDER / "prompts.jsonl", tmp_path / "bad_prompts.jsonl")
    return [*(item.prompt for item in (*examples, *rankings)), *(prompt.text for prompt in prompts)]


def num_words(text: str) -> int:
    return len(text.split())


def reply_lengths(item: SeedItem) -> list[int]:
    """Words of the replies to an item's prompt, the best reply first."""
    (ranked,) = item.ranked
    return [num_words(reply.text) for reply in ranked.replies]


def test_the_presets_sets_are_filled_without_a_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where a clone's paths start
    config = load_config(PRESET)
    assert config.prompts.path is not None
    sets = read_jsonl_sets(config.seed_data, config.run.seed, tmp_path / "bad.jsonl")
    prompts = list(read_prompts(config.prompts.path, tmp_path / "bad_prompts.jsonl"))
    assert list(tmp_path.iterdir()) == []
    counts = sets.counts
    assert counts["examples"] >= 70 and counts["rankings"] >= 110 and len(prompts) >= 80
    assert counts["duplicate_texts"] == counts["near_duplicates"] == 0
    assert len(sets.eft_sources) == config.seed_data.num_eft_sources == 60
    assert counts["eft_eval_items"] >= 90 and len(sets.ift) >= 60


def test_no_question_is_like_another(questions: list[str]) -> None:
    pool = RougePool(0.5)
    for question in questions:
        assert not pool.has_similar(question), question
        pool.add(question)
    assert pool.has_similar(questions[0])


def test_sizes(examples: list[SeedItem], rankings: list[SeedItem], questions: list[str]) -> None:
    assert all(10 <= num_words(question) <= 160 for question in questions)
    assert all(15 <= num_words(item.target or "") <= 70 for item in examples)
    lengths = [reply_lengths(item) for item in rankings]
    assert {len(replies) for replies in lengths} == {3, 4} and sum(map(len, lengths)) >= 330
    assert max(map(max, lengths)) <= 90


def test_ranks_are_whole_orders(rankings: list[SeedItem]) -> None:
    for item in rankings:
        (ranked,) = item.ranked
        assert [reply.rank for reply in ranked.replies] == list(range(len(ranked.replies))), item.prompt


def test_length_does_not_give_the_rank_away(rankings: list[SeedItem]) -> None:
    lengths = [reply_lengths(item) for item in rankings]
    ranks = [rank for replies in lengths for rank in range(len(replies))]
    assert abs(correlation(ranks, [length for replies in lengths for length in replies])) < 0.1
    in_pairs = [better > worse for replies in lengths for better, worse in combinations(replies, 2) if better != worse]
    assert 0.45 < sum(in_pairs) / len(in_pairs) < 0.55
    longest = sum(replies[0] > max(replies[1:]) for replies in lengths) / len(lengths)
    shortest = sum(replies[0] < min(replies[1:]) for replies in lengths) / len(lengths)
    assert 0.25 < longest < 0.4 and 0.25 < shortest < 0.4


def test_nothing_is_copied_from_known_sets(
    shared_data: Path, examples: list[SeedItem], rankings: list[SeedItem], questions: list[str]
) -> None:
    known = list(texts_of(shared_data / "self_instruct_seed_tasks.jsonl", shared_data / "oasst_sample.trees.jsonl"))
    replies = [reply.text for item in rankings for ranked in item.ranked for reply in ranked.replies]
    ours = [*questions, *(item.target or "" for item in examples), *replies]
    in_a_row = {row for text in known for row in rows(text)}
    copied = [" ".join(row) for text in ours for row in rows(text) if row in in_a_row]
    assert copied == [] and len(in_a_row) > 10_000
    pool = RougePool(0.5, known)
    assert not [text for text in ours if len(rouge_words(text)) >= WORDS_IN_A_ROW and pool.has_similar(text)]


def texts_of(*paths: Path) -> Iterator[str]:
    """Every text anywhere in the lines of JSONL files."""
    todo: list[Any] = [orjson.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    while todo:
        match todo.pop():
            case str(text):
                yield text
            case list(values):
                todo += values
            case dict(fields):
                todo += fields.values()


def rows(text: str) -> Iterator[tuple[str, ...]]:
    """Every WORDS_IN_A_ROW words that follow one another in a text."""
    words = rouge_words(text)
    return zip(*(words[start:] for start in range(WORDS_IN_A_ROW)), strict=False)
