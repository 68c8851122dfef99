"""The transformers backend beyond the contract (sampler_contract.py): what it samples does not depend on batching,
padding or a model folder's own settings."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sampler_contract import END_IDS, GREEDY, SAMPLED, VOCABULARY, Prompts, make_model, random_prompts
from transformers import GenerationConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling import huggingface_sampler
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.huggingface_sampler import DecodingBatch, HuggingFaceSampler, choose, choose_in_nucleus
from srlm_mega.sampling.sampler import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return random_prompts()


@pytest.fixture
def sampler(folder: Path) -> Iterator[HuggingFaceSampler]:
    sampler = HuggingFaceSampler(folder, END_IDS, "cpu", batch_size=16)
    yield sampler
    sampler.close()


def test_greedy_is_what_generate_gives_for_each_prompt_alone(
    folder: Path, sampler: HuggingFaceSampler, prompts: Prompts
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    settings = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=list(END_IDS), pad_token_id=0)
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


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_batch_size_does_not_decide(
    folder: Path, sampler: HuggingFaceSampler, prompts: Prompts, batch_size: int
) -> None:
    other = HuggingFaceSampler(folder, END_IDS, "cpu", batch_size)
    assert other.sample(prompts, SAMPLED) == sampler.sample(prompts, SAMPLED)


@pytest.fixture
def refills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows at work and rows that join them, of every refill."""
    found: list[tuple[int, int]] = []
    followed_by = DecodingBatch.followed_by

    def spy(batch: DecodingBatch, other: DecodingBatch) -> DecodingBatch:
        found.append((len(batch.mask), len(other.mask)))
        both = followed_by(batch, other)
        assert bool(both.mask[:, 0].any()), "columns that no row needs are dropped"
        return both

    monkeypatch.setattr(DecodingBatch, "followed_by", spy)
    return found


@pytest.mark.parametrize("patience", [0, 4])
def test_waiting_prompts_take_the_place_of_finished_rows(
    folder: Path,
    prompts: Prompts,
    refills: list[tuple[int, int]],
    patience: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = replace(SAMPLED, max_new_tokens=30, logprobs=True)
    alone = HuggingFaceSampler(folder, END_IDS, "cpu", batch_size=3).sample(prompts, params)
    assert refills == [], "a batch of one prompt has no room for a second one"
    monkeypatch.setattr(huggingface_sampler, "PATIENCE", patience)
    sampler = HuggingFaceSampler(folder, END_IDS, "cpu", batch_size=12)
    refilled = sampler.sample(prompts, params)
    assert refilled == alone
    logprobs = [[one.cumulative_logprob for group in some for one in group] for some in (refilled, alone)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=2e-3)
    assert len(refills) >= 3 and all(old > 0 and new % 3 == 0 and old + new <= 12 for old, new in refills)
    schedule = list(refills)
    assert sampler.sample(prompts, params) == refilled and refills == schedule * 2, "it follows from the requests"


def test_answers_of_equal_length_are_not_refilled(
    folder: Path, prompts: Prompts, refills: list[tuple[int, int]]
) -> None:
    HuggingFaceSampler(folder, (), "cpu", batch_size=12).sample(prompts, SAMPLED)
    assert refills == []


def test_layers_with_a_window_are_not_refilled(
    tmp_path: Path, prompts: Prompts, refills: list[tuple[int, int]]
) -> None:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        sliding_window=6,
        initializer_range=0.35,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    params = replace(SAMPLED, max_new_tokens=30)
    alone = HuggingFaceSampler(tmp_path, END_IDS, "cpu", batch_size=1).sample(prompts, params)
    assert HuggingFaceSampler(tmp_path, END_IDS, "cpu", batch_size=12).sample(prompts, params) == alone
    assert len({len(one.token_ids) for group in alone for one in group}) > 10, "rows end at different times"
    assert refills == []


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


def choose_by_sorting(logits: torch.Tensor, params: SamplingParams, draws: torch.Tensor) -> torch.Tensor:
    """The definition: the whole vocabulary, stably sorted."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    kept = (cumulative - ordered < params.top_p).sum(dim=-1, keepdim=True)
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative.gather(-1, kept - 1), right=True)
    return tokens.gather(-1, torch.minimum(place, kept - 1))[:, 0]


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-6, 6), min_size=23, max_size=23), min_size=1, max_size=3),
    vocabulary=st.integers(1, 23),
    unit=st.sampled_from([0.0, 1e-16, 0.1, 0.693147, 3.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 5.0]),
    top_p=st.one_of(st.sampled_from([1e-9, 0.25, 0.5, 0.75, 1 - 1e-12, 1.0]), st.floats(0.01, 1.0)),
    draw=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1 - 2**-53]), st.floats(0.0, 1.0, exclude_max=True)),
    likeliest=st.integers(1, 23),
)
def test_the_likeliest_tokens_alone_give_what_the_sorted_vocabulary_gives(
    values: list[list[int]],
    vocabulary: int,
    unit: float,
    temperature: float,
    top_p: float,
    draw: float,
    likeliest: int,
) -> None:
    """Whole numbers of a unit make ties within and at the end of the likeliest; unit 0 is a flat distribution. Draws
    also fall on the limits between tokens."""
    logits = unit * torch.tensor(values)[:, :vocabulary].float()
    params = SamplingParams(1, temperature, top_p, max_new_tokens=1, seed=0)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    cumulative = probabilities.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    limits = (cumulative / cumulative[:, -1:] * (1 - 2**-53)).T
    with patch.object(huggingface_sampler, "LIKELIEST", likeliest):
        for draws in (torch.full((len(values),), draw, dtype=torch.float64), *limits):
            chosen = choose(logits, params, draws)
            assert chosen.tolist() == choose_by_sorting(logits, params, draws).tolist()
            alone = [choose(one[None], params, own[None]) for one, own in zip(logits, draws, strict=True)]
            assert torch.cat(alone).tolist() == chosen.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_sorted_for_wide_nuclei_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(8, 5000) * torch.tensor([0.1, 1, 2, 3, 4, 5, 6, 7])[:, None]).to(dtype)
    held = torch.softmax(logits.double(), dim=-1).sort(dim=-1, descending=True).values[:, :256].sum(dim=-1)
    sizes: list[tuple[int, int]] = []

    def spy(probabilities: torch.Tensor, largest: torch.Tensor, top_p: float, draws: torch.Tensor) -> torch.Tensor:
        sizes.append((len(largest), largest.shape[-1]))
        return choose_in_nucleus(probabilities, largest, top_p, draws)

    monkeypatch.setattr(huggingface_sampler, "choose_in_nucleus", spy)
    for top_p in (0.5, 0.9):
        wide = int((held < top_p).sum())
        assert 0 < wide < 8
        for _ in range(20):
            draws = torch.rand(8, dtype=torch.float64)
            params = SamplingParams(1, 1.0, top_p, max_new_tokens=1, seed=0)
            assert choose(logits, params, draws).tolist() == choose_by_sorting(logits, params, draws).tolist()
            assert sizes[-2:] == [(8, 256), (wide, 5000)]


def test_a_folder_without_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        HuggingFaceSampler(tmp_path, END_IDS, "cpu", batch_size=4)


def test_the_configured_backend_is_opened(folder: Path, prompts: Prompts, sampler: HuggingFaceSampler) -> None:
    opened = open_sampler(SamplerConfig(device="cpu", batch_size=16), folder, END_IDS)
    assert opened.sample(prompts, SAMPLED) == sampler.sample(prompts, SAMPLED)
    opened.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_greedy_on_a_gpu_is_greedy_on_a_cpu(folder: Path, sampler: HuggingFaceSampler, prompts: Prompts) -> None:
    gpu = HuggingFaceSampler(folder, END_IDS, "cuda", batch_size=16)
    assert gpu.sample(prompts, GREEDY) == sampler.sample(prompts, GREEDY)
    gpu.close()


def test_cumulative_log_probabilities_are_the_models(
    folder: Path, sampler: HuggingFaceSampler, prompts: Prompts
) -> None:
    """Against a plain forward pass over prompt and completion: before temperature and top-p, the end token included."""
    model, params = LlamaForCausalLM.from_pretrained(folder), replace(SAMPLED, temperature=0.7)
    not_asked = sampler.sample(prompts, params)
    assert {completion.cumulative_logprob for group in not_asked for completion in group} == {None}
    asked = sampler.sample(prompts, replace(params, logprobs=True))
    assert asked == not_asked, "the same completions"
    for prompt, group in zip(prompts, asked, strict=True):
        for completion in group:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(dim=-1)[range(len(completion.token_ids)), list(completion.token_ids)]
            assert completion.cumulative_logprob == pytest.approx(chosen.sum().item(), abs=2e-3)
            assert chosen.sum().item() != pytest.approx((chosen / 0.7).sum().item(), abs=2e-3)
