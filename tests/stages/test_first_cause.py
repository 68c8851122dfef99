"""A round that goes wrong is stopped with its first cause before the consequences: unknown tokens, cuts, repeats."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from sampling_run import begin_run, work_of

from srlm_mega.chat import Chat
from srlm_mega.config.rounds import HealthConfig, Limit
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.evaluation.health_limits import RoundHealth, figure, unknown_share
from srlm_mega.judging.pair_counts import PairCounter, PairCounts
from srlm_mega.judging.pairs import Ranked, preference_pair
from srlm_mega.judging.scored_candidates import ScoredCandidate
from srlm_mega.records import Candidate, Message, Prompt, SftExample, parse_line, read_jsonl, write_jsonl
from srlm_mega.run.manifest import Identity
from srlm_mega.stages.health import MEANINGS, why_stopped
from srlm_mega.stages.pairing import first_cause
from srlm_mega.stages.sample_and_judge import candidates_task, judgements_task, sample_candidates
from srlm_mega.stages.train import tokenized

FINE = PairCounts(
    prompts=25, pairs=0, tied=5, small_gap=0, identical=0, too_few=20, candidates=100, scored=90, truncated=5,
    unscored=5, judgements=300, unparsed=30, duplicates=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "unknown", "said"),
    [
        (replace(FINE, truncated=100, unparsed=300, duplicates=75), 0.9, "90.0% of the prompts' tokens are unknown"),
        (replace(FINE, truncated=100, unparsed=300, duplicates=75), 0.0, "100 of 100 candidates were cut"),
        (replace(FINE, unparsed=300, duplicates=75, empty=100), None, "100 of 100 candidates are empty"),
        (replace(FINE, unparsed=300, duplicates=75), None, "75 of 100 candidates repeat another"),
        (replace(FINE, unparsed=300, tied=25), 0.01, "300 of 300 judgements have no score"),
        (replace(FINE, tied=20), None, "20 of 25 prompts have candidates with equal scores"),
        (FINE, 0.0, "No single cause"),
        (PairCounts(*([0] * 12)), None, "No single cause"),
    ],
)
def test_the_first_cause_of_too_few_pairs(counts: PairCounts, unknown: float | None, said: str) -> None:
    cause = first_cause(counts, unknown)
    assert said in cause and cause.count("The first cause: ") == (said != "No single cause")


def candidate(number: int, text: str, system: str = "") -> Candidate:
    return Candidate(f"p-c{number}", "p", "why?", text, "stop", 0, "m", (1,), (2, number), system=system)


def test_empty_candidates_are_counted() -> None:
    counter = PairCounter()
    group = [ScoredCandidate(candidate(n, text), "scored", 3.0, (), None, None) for n, text in enumerate(["", "", "a"])]
    counter.add(group, "tied")
    assert counter.counts().empty == 2


def test_a_stopped_round_names_causes_before_consequences() -> None:
    limits = HealthConfig(parse_failure=Limit(stop=0.2), tie_rate=Limit(stop=0.1))
    values = {"tie_rate": 0.9, "parse_failure": 1.0, "duplicates": 0.75, "truncation": 1.0, "unknown_tokens": 0.9}
    figures = {key: figure(values[key], limit) for key, limit in limits if key in values}
    message = why_stopped(RoundHealth(1, "stop", figures), Path("health.json"))
    places = [message.index(f"({key}, ") for key in reversed(values)]
    assert places == sorted(places) and "the first may explain the others" in message
    assert "health.unknown_tokens.stop=null" in message and "health.truncation.stop" not in message
    assert list(MEANINGS) == list(HealthConfig.model_fields)


def test_candidates_say_how_much_of_their_prompts_is_unknown(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", ["list 4 animals", "Why sleep?"], "candidates.n=2", "candidates.max_new_tokens=2")
    done = sample_candidates(work_of(run, "round_1/candidates"))
    assert (done.counts["prompt_tokens"], done.counts["unknown_tokens"]) == (3 + 3 + 2 + 3, 2)
    assert unknown_share(run, 1) is None, "as for a round of an older version"
    identity = Identity("round_1/candidates", {}, {})
    run.commit(identity, done.rows, 0.0, "test", done.counts)
    assert unknown_share(run, 1) == pytest.approx(2 / 11)


def test_a_system_message_goes_through_a_round(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", [], "candidates.n=2", "candidates.max_new_tokens=4")
    prompts = [Prompt("p0", "list 4 animals", "test", "upper"), Prompt("p1", "list 4 animals", "test")]
    write_jsonl(run.output("round_1/prompts") / "prompts.jsonl", prompts)
    chat, work = Chat(toy_tokenizer()), work_of(run, "round_1/candidates")
    task, _ = candidates_task(work)
    assert [one.token_ids for one in task.requests] == [
        chat.prompt("list 4 animals", "upper"),
        chat.prompt(prompts[1].text),
    ]
    assert task.requests[0].token_ids != task.requests[1].token_ids
    sample_candidates(work)
    made = list(read_jsonl(work.out / "candidates.jsonl", Candidate))
    assert [one.system for one in made] == ["upper", "upper", "", ""] and {one.prompt for one in made} == {
        prompts[0].text
    }
    run.commit(Identity("round_1/candidates", {}, {}), 4, 0.0, "test", {})
    asked, _ = judgements_task(work_of(run, "round_1/judgements"))
    template = (run.output("seed") / "judge_template.txt").read_text()
    question = "System: upper\n\nUser: list 4 animals"
    assert asked.requests[0].token_ids == chat.prompt(
        template.replace("{{instruction}}", question).replace("{{response}}", made[0].text)
    )


def test_records_of_older_versions_have_no_system_message() -> None:
    old = {"id": "p", "text": "why?", "source": "file"}
    assert parse_line(Prompt, orjson.dumps(old)) == Prompt("p", "why?", "file", "")


def test_a_pair_has_the_system_message_first() -> None:
    best, worst = Ranked(4.0, candidate(0, "a", "Be brief."), None), Ranked(1.0, candidate(1, "b", "Be brief."), None)
    pair = preference_pair(best, worst, 1.0)
    assert pair.prompt == (Message("system", "Be brief."), Message("user", "why?"))
    plain = preference_pair(Ranked(4.0, candidate(0, "a"), None), Ranked(1.0, candidate(1, "b"), None), 1.0)
    assert plain.prompt == (Message("user", "why?"),)


def test_a_supervised_example_is_trained_on_with_its_system_message() -> None:
    chat, example = Chat(toy_tokenizer()), SftExample("i", "ift", "list 4 animals", "sure", "test", "upper")
    (sequence,) = tokenized([example], chat)
    prompt = chat.prompt("list 4 animals", "upper")
    assert sequence.tokens == prompt + chat.completion("sure") and sequence.num_prompt == len(prompt)
