"""The transformers backend: what it samples does not depend on batching, padding or a model folder's own settings."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from srlm_mega.config import SamplerConfig
from srlm_mega.sampling.huggingface import HuggingFaceSampler, choose
from srlm_mega.sampling.sampler import Completion, SamplingParams, open_sampler

VOCABULARY, EOS, POSITIONS = 32, 2, 48
GREEDY = SamplingParams(n=1, temperature=0.0, top_p=1.0, max_new_tokens=20, seed=0)
SAMPLED = SamplingParams(n=3, temperature=1.0, top_p=0.9, max_new_tokens=20, seed=5)

Prompts = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with large weights (so that it has opinions), and a generation_config that must be ignored."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.35,
        eos_token_id=EOS,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    GenerationConfig(do_sample=True, temperature=9.0, top_k=1, max_new_tokens=1, eos_token_id=5).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    rng = random.Random(0)
    return [tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 15))) for _ in range(24)]


@pytest.fixture
def sampler(folder: Path) -> Iterator[HuggingFaceSampler]:
    sampler = HuggingFaceSampler(folder, EOS, "cpu", batch_size=16)
    yield sampler
    sampler.close()


def flat(completions: list[list[Completion]]) -> list[Completion]:
    return [completion for group in completions for completion in group]


def test_greedy_is_what_generate_gives_for_each_prompt_alone(
    folder: Path, sampler: HuggingFaceSampler, prompts: Prompts
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    settings = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=0)
    expected = [
        tuple(model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist())
        for prompt in prompts
    ]
    sampled = sampler.sample(prompts, GREEDY)
    assert [completion.token_ids for (completion,) in sampled] == expected
    assert len(set(expected)) > 10, "a model that says the same to everything would prove nothing"


def test_padding_without_a_mask_would_be_seen(folder: Path, sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    """The negative control of the test above: the same prompts with padding taken for text give something else."""
    longest = max(map(len, prompts))
    padded = [(0,) * (longest - len(prompt)) + prompt for prompt in prompts]
    assert sampler.sample(padded, GREEDY) != sampler.sample(prompts, GREEDY)


def test_the_end_token_ends_exactly_the_stopped(sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    completions = flat(sampler.sample(prompts, SAMPLED))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.finish_reason == "stop"
        assert completion.token_ids.count(EOS) == stopped
        assert (completion.token_ids[-1] == EOS) == stopped
        assert stopped or len(completion.token_ids) == SAMPLED.max_new_tokens


def test_an_end_token_in_the_last_place_is_a_stop(sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    whole = flat(sampler.sample(prompts, SAMPLED))
    length = next(len(item.token_ids) for item in whole if item.finish_reason == "stop" and len(item.token_ids) > 1)
    short = flat(sampler.sample(prompts, replace(SAMPLED, max_new_tokens=length)))
    assert any(item.finish_reason == "stop" and len(item.token_ids) == length for item in short)


def test_n_completions_in_the_order_of_the_prompts(sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    sampled = sampler.sample(prompts, SAMPLED)
    assert [len(group) for group in sampled] == [3] * len(prompts)
    assert all(len(set(group)) == 3 for group in sampled)
    assert len({completion.seed for completion in flat(sampled)}) == 3 * len(prompts)
    forward, backward = (flat(sampler.sample(order, GREEDY)) for order in (prompts, prompts[::-1]))
    assert [item.token_ids for item in forward] == [item.token_ids for item in backward[::-1]]


def test_the_seed_decides_and_nothing_else(sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    first = sampler.sample(prompts, SAMPLED)
    torch.manual_seed(99)
    sampler.sample(prompts[:5], replace(SAMPLED, seed=1))
    assert sampler.sample(prompts, SAMPLED) == first
    assert sampler.sample(prompts, replace(SAMPLED, seed=6)) != first
    state = torch.get_rng_state()
    sampler.sample(prompts, SAMPLED)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_batch_size_does_not_decide(
    folder: Path, sampler: HuggingFaceSampler, prompts: Prompts, batch_size: int
) -> None:
    other = HuggingFaceSampler(folder, EOS, "cpu", batch_size)
    assert other.sample(prompts, SAMPLED) == sampler.sample(prompts, SAMPLED)


def test_the_same_prompt_twice_gets_different_draws(sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    first, second = sampler.sample([prompts[0], prompts[0]], SAMPLED)
    assert [item.token_ids for item in first] != [item.token_ids for item in second]


def test_sampled_first_tokens_follow_the_models_nucleus(folder: Path, sampler: HuggingFaceSampler) -> None:
    params = SamplingParams(n=4000, temperature=0.7, top_p=0.8, max_new_tokens=1, seed=1)
    prompt = (1, 9, 4)
    counts = Counter(completion.token_ids[0] for completion in sampler.sample([prompt], params)[0])
    with torch.inference_mode():
        logits = LlamaForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits[0, -1]
    probabilities = torch.softmax(logits / 0.7, dim=-1).tolist()
    nucleus: dict[int, float] = {}
    for token in sorted(range(VOCABULARY), key=lambda token: -probabilities[token]):
        if sum(nucleus.values()) >= 0.8:
            break
        nucleus[token] = probabilities[token]
    assert 2 <= len(nucleus) < VOCABULARY
    mass = sum(nucleus.values())
    assert counts.keys() <= nucleus.keys()
    for token, probability in nucleus.items():
        share = probability / mass
        assert abs(counts[token] / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5, token


def test_choosing_by_hand() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05 of tokens 2, 0, 3, 1.
    logits = torch.log(torch.tensor([0.3, 0.05, 0.5, 0.15])).repeat(6, 1)
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999], dtype=torch.float64)
    plain = SamplingParams(n=1, temperature=1.0, top_p=1.0, max_new_tokens=1, seed=0)
    assert choose(logits, plain, draws).tolist() == [2, 2, 0, 0, 3, 1]
    # A nucleus of 0.7: tokens 2 and 0 with 0.5 / 0.8 and 0.3 / 0.8.
    assert choose(logits, replace(plain, top_p=0.7), draws).tolist() == [2, 2, 2, 0, 0, 0]
    # Temperature 0.5 squares: 0.25, 0.09, 0.0225, 0.0025 of 0.365.
    assert choose(logits, replace(plain, temperature=0.5), draws).tolist() == [2, 2, 2, 0, 0, 1]
    assert choose(logits, replace(plain, top_p=1e-9), draws).tolist() == [2] * 6
    assert choose(logits, replace(plain, temperature=0.0), draws).tolist() == [2] * 6


def test_prompts_that_do_not_fit_are_refused(sampler: HuggingFaceSampler) -> None:
    fitting = POSITIONS - GREEDY.max_new_tokens
    sampler.sample([(3,) * fitting], GREEDY)
    with pytest.raises(ValueError, match=r"prompt 1 has 29 tokens; with max_new_tokens 20 .* 48 positions"):
        sampler.sample([(3,), (3,) * (fitting + 1)], GREEDY)
    with pytest.raises(ValueError, match="no tokens"):
        sampler.sample([()], GREEDY)
    with pytest.raises(ValueError, match="vocabulary"):
        sampler.sample([(VOCABULARY,)], GREEDY)


def test_no_prompts_no_completions(sampler: HuggingFaceSampler) -> None:
    assert sampler.sample([], SAMPLED) == []


def test_a_folder_without_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        HuggingFaceSampler(tmp_path, EOS, "cpu", batch_size=4)


def test_the_configured_backend_is_opened(folder: Path, prompts: Prompts, sampler: HuggingFaceSampler) -> None:
    opened = open_sampler(SamplerConfig(device="cpu", batch_size=16), folder, EOS)
    assert opened.sample(prompts, SAMPLED) == sampler.sample(prompts, SAMPLED)
    opened.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_greedy_on_a_gpu_is_greedy_on_a_cpu(folder: Path, sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    gpu = HuggingFaceSampler(folder, EOS, "cuda", batch_size=16)
    assert gpu.sample(prompts, GREEDY) == sampler.sample(prompts, GREEDY)
    gpu.close()
