"""What every backend must do. A test module imports all of this and has a fixture `sampler` of its own: a model with
the limits below, loaded."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from srlm_mega.chat import StopStrings
from srlm_mega.sampling.sampler import Completion, Request, Sampler, SamplingParams

VOCABULARY, EOS, POSITIONS = 32, 2, 48
END_IDS = (EOS, 20)  # the second one is an ordinary token to the tokenizer
GREEDY = SamplingParams(n=1, temperature=0.0, top_p=1.0, max_new_tokens=20, seed=0)
SAMPLED = SamplingParams(n=3, temperature=1.0, top_p=0.9, max_new_tokens=20, seed=5)

Prompts = list[tuple[int, ...]]


@dataclass(frozen=True)
class Ties:
    """What a backend's answers depend on besides the request: nothing, or also what is computed beside it. Sums are
    then added up in another order, and a greedy answer may take another way where the two likeliest tokens nearly tie:
    where the logits of `model` (the same weights, in fp32) differ by no more than `gap`. Draws are equal for the same
    requests in the same order."""

    gap: float = 0.0
    model: LlamaForCausalLM | None = None

    def check(
        self, found: Sequence[Completion], expected: Sequence[Completion], prompts: Sequence[tuple[int, ...]] = ()
    ) -> None:
        """Assert that two answers are one, to greedy requests with these prompts, or (without prompts) to others."""
        if self.model is None:
            assert list(found) == list(expected)
            return
        assert [one.seed for one in found] == [one.seed for one in expected]
        for prompt, one, other in zip(prompts, found, expected, strict=bool(prompts)):
            pairs = zip(one.token_ids, other.token_ids, strict=False)
            agreed = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
            if agreed is not None:
                with torch.inference_mode():
                    logits = self.model(torch.tensor([[*prompt, *one.token_ids[:agreed]]])).logits[0, -1]
                first, second = logits.topk(2).values.tolist()
                assert first - second <= self.gap, f"{prompt}: {one.token_ids} and {other.token_ids}"


@pytest.fixture(scope="module")
def ties() -> Ties:
    """Of a backend that is strict. Modules of others have their own."""
    return Ties()


def make_model(folder: Path, head_size: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """A random model with large weights (so that it has opinions), and a generation_config that must be ignored."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4 * head_size,
        intermediate_size=8 * head_size if head_size > 4 else 24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.35 * (4 / head_size) ** 0.5,
        eos_token_id=EOS,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    GenerationConfig(do_sample=True, temperature=9.0, top_k=1, max_new_tokens=1, eos_token_id=5).save_pretrained(folder)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return random_prompts()


def random_prompts() -> Prompts:
    rng = random.Random(0)
    return [tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 15))) for _ in range(24)]


def alphabet() -> Tokenizer:
    """A character per token: ASCII, and characters of two, three and four bytes."""
    letters = "abcdefghijklmnopqrstuvwxé界😀\u202e\n"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": EOS} | {letter: 3 + place for place, letter in enumerate(letters)}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def flat(completions: list[list[Completion]]) -> list[Completion]:
    return [completion for group in completions for completion in group]


def test_one_of_the_end_tokens_ends_exactly_the_stopped(sampler: Sampler, prompts: Prompts) -> None:
    completions = flat(sampler.sample(prompts, SAMPLED))
    assert {one.token_ids[-1] for one in completions if one.finish_reason == "stop"} == set(END_IDS)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.finish_reason == "stop"
        assert sum(map(completion.token_ids.count, END_IDS)) == stopped
        assert (completion.token_ids[-1] in END_IDS) == stopped
        assert stopped or len(completion.token_ids) == SAMPLED.max_new_tokens
        assert len(completion.token_ids) <= SAMPLED.max_new_tokens
        assert all(type(token) is int and 0 <= token < VOCABULARY for token in completion.token_ids)


def test_an_end_token_in_the_last_place_is_a_stop(sampler: Sampler, prompts: Prompts) -> None:
    whole = flat(sampler.sample(prompts, SAMPLED))
    length = next(len(item.token_ids) for item in whole if item.finish_reason == "stop" and len(item.token_ids) > 1)
    short = flat(sampler.sample(prompts, replace(SAMPLED, max_new_tokens=length)))
    assert any(item.finish_reason == "stop" and len(item.token_ids) == length for item in short)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(
    sampler: Sampler, prompts: Prompts, ties: Ties
) -> None:
    """Expected by the definition: the shortest beginning whose text holds one, of what is sampled without."""
    tokenizer = alphabet()
    whole = flat(sampler.sample(prompts, SAMPLED))
    texts = [tokenizer.decode(list(one.token_ids)) for one in whole]
    counts = Counter(text[at : at + 2] for text in texts for at in range(len(text) - 1))
    pairs = [pair for pair, _ in counts.most_common()]
    strings = (pairs[0], pairs[1], next(pair for pair in pairs if not pair.isascii()), "never in there")
    stopped = flat(sampler.sample(prompts, replace(SAMPLED, stop=StopStrings(tokenizer, strings))))

    def end_of(tokens: tuple[int, ...]) -> int | None:
        beginnings = ((end, tokenizer.decode(list(tokens[:end]))) for end in range(1, len(tokens) + 1))
        return next((end for end, text in beginnings if any(string in text for string in strings)), None)

    ends = [end_of(one.token_ids) for one in whole]
    expected = [
        one if end is None else replace(one, token_ids=one.token_ids[:end], finish_reason="stop")
        for one, end in zip(whole, ends, strict=True)
    ]
    ties.check(stopped, expected)
    assert all(end_of(one.token_ids) in (None, len(one.token_ids)) for one in stopped)
    at_end = [one for one in stopped if end_of(one.token_ids) is not None]
    assert {one.finish_reason for one in at_end} == {"stop"}
    cut = len(at_end)
    assert 3 <= cut < len(whole), f"{cut} of {len(whole)} were cut"


def test_n_completions_in_the_order_of_the_prompts(sampler: Sampler, prompts: Prompts, ties: Ties) -> None:
    sampled = sampler.sample(prompts, SAMPLED)
    assert [len(group) for group in sampled] == [3] * len(prompts)
    assert all(len(set(group)) == 3 for group in sampled)
    assert len({completion.seed for completion in flat(sampled)}) == 3 * len(prompts)
    forward, backward = (flat(sampler.sample(order, GREEDY)) for order in (prompts, prompts[::-1]))
    assert [one.seed for one in forward] == [one.seed for one in backward], "the place of a prompt decides its seeds"
    backward = [replace(one, seed=other.seed) for one, other in zip(backward[::-1], forward, strict=True)]
    ties.check(backward, forward, prompts)
    assert len({item.token_ids for item in forward}) > 10, "one answer to everything would prove nothing"


def test_the_seed_decides_and_nothing_else(sampler: Sampler, prompts: Prompts) -> None:
    first = sampler.sample(prompts, SAMPLED)
    torch.manual_seed(99)
    random.seed(99)
    sampler.sample(prompts[:5], replace(SAMPLED, seed=1))
    assert sampler.sample(prompts, SAMPLED) == first
    assert sampler.sample(prompts, replace(SAMPLED, seed=6)) != first
    state = torch.get_rng_state()
    sampler.sample(prompts, SAMPLED)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


def test_part_of_the_prompts_is_sampled_as_in_the_whole(sampler: Sampler, prompts: Prompts, ties: Ties) -> None:
    whole = sampler.sample(prompts, SAMPLED)
    ties.check(flat(sampler.sample(prompts[7:12], SAMPLED, first=7)), flat(whole[7:12]))
    assert sampler.sample(prompts[7:12], SAMPLED) != whole[7:12], "the place of a prompt decides its seeds"


def test_the_same_prompt_twice_gets_different_draws(sampler: Sampler, prompts: Prompts) -> None:
    first, second = sampler.sample([prompts[0], prompts[0]], SAMPLED)
    assert [item.token_ids for item in first] != [item.token_ids for item in second]


def test_prompts_that_do_not_fit_are_refused_and_never_cut(sampler: Sampler) -> None:
    fitting = POSITIONS - GREEDY.max_new_tokens
    sampler.sample([(3,) * fitting], GREEDY)
    with pytest.raises(ValueError, match=r"prompt 1 has 29 tokens; with max_new_tokens 20 .* 48 positions"):
        sampler.sample([(3,), (3,) * (fitting + 1)], GREEDY)
    with pytest.raises(ValueError, match="no tokens"):
        sampler.sample([()], GREEDY)
    with pytest.raises(ValueError, match="vocabulary"):
        sampler.sample([(VOCABULARY,)], GREEDY)
    assert len(sampler.sample([(3,)], GREEDY)) == 1, "a refused request leaves the sampler usable"


def test_a_stream_answers_as_the_calls_do(sampler: Sampler, prompts: Prompts, ties: Ties) -> None:
    """Requests of two calls, one after the other, with seeds and positions of their own."""
    calls = [(prompts[:9], SAMPLED, 0), (prompts[9:], replace(SAMPLED, seed=8, n=2), 4)]
    expected = [sampler.sample(*call) for call in calls]
    requests = [
        Request(prompt, params, position)
        for some, params, first in calls
        for position, prompt in enumerate(some, first)
    ]
    answers = {(one.request.params.seed, one.request.position): one for one in sampler.stream(iter(requests))}
    assert [answer.error for answer in answers.values()] == [""] * len(requests)
    found = [list(answers[one.params.seed, one.position].completions) for one in requests]
    assert [len(one) for one in found] == [one.params.n for one in requests]
    ties.check(flat(found), [one for group in expected for one in flat(group)])


def test_a_stream_that_is_left_early_does_no_harm(sampler: Sampler, prompts: Prompts, ties: Ties) -> None:
    stream = sampler.stream(Request(prompt, SAMPLED, position) for position, prompt in enumerate(prompts))
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    whole = sampler.sample(prompts, SAMPLED)
    ties.check(first.completions, whole[first.request.position])


def test_a_stream_refuses_what_does_not_fit(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        list(sampler.stream(iter([Request((VOCABULARY,), GREEDY, 0)])))
    assert len(list(sampler.stream(iter([Request((3,), GREEDY, 0)])))) == 1


def test_no_prompts_no_completions(sampler: Sampler) -> None:
    assert sampler.sample([], SAMPLED) == []
    assert list(sampler.stream(iter([]))) == []


def test_ten_thousand_requests_leave_memory_as_it_was(sampler: Sampler, prompts: Prompts) -> None:
    params = replace(SAMPLED, n=1, max_new_tokens=1)
    many = [prompts[number % len(prompts)] for number in range(1000)]
    resident = []
    for number in range(10):
        assert len(sampler.sample(many, params, first=1000 * number)) == 1000
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[2] < 30 * 2**20, [size // 2**20 for size in resident]
