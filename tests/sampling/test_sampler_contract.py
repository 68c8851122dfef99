"""The contract against every backend that can run here; TensorRT-LLM's against a stand-in, which is not the real one.
For the real one see tests/gpu."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import pytest
from places import ROOT
from sampler_contract import *  # noqa: F403
from sampler_contract import END_IDS, EOS, GREEDY, POSITIONS, SAMPLED, VOCABULARY, Prompts, flat, make_model

from srlm_mega.checkpoints_conversion.engine import EngineRecord, Limits, Runtime, write_record
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import Sampler

STAND_IN = ROOT / "tests/support/tensorrt_llm_stand_in"
RUNTIME = Runtime("1.2.1+stand.in", "10.14.1", "9.0")
LIMITS = Limits(max_batch_size=256, max_num_tokens=POSITIONS, max_input_len=POSITIONS - 1, max_seq_len=POSITIONS)
ENGINE = EngineRecord(**asdict(RUNTIME), tp=1, pp=1, limits=LIMITS, model_hash="", scales_hash="", weights_hash="")
BACKENDS = ["huggingface", "trtllm_torch, stand-in", "trtllm_engine, stand-in"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, and beside it what the stand-in takes for an engine."""
    path = tmp_path_factory.mktemp("M1") / "huggingface"
    make_model(path)
    engine = path.parent / "engine"
    engine.mkdir()
    write_record(engine, ENGINE)
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    build = {"max_input_len": POSITIONS - 1, "max_seq_len": POSITIONS}
    (engine / "config.json").write_text(json.dumps({"pretrained_config": limits, "build_config": build}))
    return path


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    """The stand-in as the package `tensorrt_llm`, for this module."""
    sys.path.insert(0, str(STAND_IN))
    with patch("torch.cuda.get_device_capability", lambda: (9, 0)):
        yield
    sys.path.remove(str(STAND_IN))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tensorrt", "tensorrt_llm") or name.startswith(
            "srlm_mega.sampling.trtllm_sampler"
        ):
            del sys.modules[name]


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request: pytest.FixtureRequest, folder: Path, stand_in: None) -> Iterator[Sampler]:
    backend = request.param.partition(",")[0]
    loaded = folder.parent / "engine" if backend == "trtllm_engine" else folder
    sampler = open_sampler(SamplerConfig(backend=backend, device="cpu", batch_size=256), loaded, END_IDS)
    yield sampler
    sampler.close()


def trtllm(folder: Path, backend: str = "trtllm_torch") -> Sampler:
    loaded = folder.parent / "engine" if backend == "trtllm_engine" else folder
    return open_sampler(SamplerConfig(backend=backend, batch_size=16), loaded, END_IDS)  # type: ignore[arg-type]


def test_the_stand_in_refuses_what_the_documentation_does_not_have(stand_in: None, folder: Path) -> None:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    for wrong in (
        lambda: LLM(model=str(folder), skip_tokenizer_init=True, tp_size=2),
        lambda: SamplingParams(max_new_tokens=3),
        lambda: KvCacheConfig(reuse=True),
        lambda: SamplingParams(n=2),  # greedy: nothing says how to sample
        lambda: LLM(model=str(folder), skip_tokenizer_init=True).generate([[3]], SamplingParams()),
        lambda: LLM(model=str(folder), skip_tokenizer_init=True).generate([(3, 4)], SamplingParams(end_id=2)),
    ):
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_seeds_need_the_sampler_that_honours_them(stand_in: None, folder: Path, prompts: Prompts) -> None:
    """The stand-in does what 1.2 does: without `sampler_type` a request's seed is not looked at."""
    from tensorrt_llm import LLM, SamplingParams

    llm = LLM(model=str(folder), skip_tokenizer_init=True)
    params = SamplingParams(end_id=EOS, temperature=1.0, top_p=0.9, seed=3)
    first, second = ([one.outputs[0].token_ids for one in llm.generate([[3]] * 9, params)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("backend", ["trtllm_torch", "trtllm_engine"])
def test_the_end_token_is_there_whether_or_not_the_answer_keeps_it(
    stand_in: None, folder: Path, prompts: Prompts, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm import LLM

    without = trtllm(folder, backend).sample(prompts, SAMPLED)
    monkeypatch.setattr(LLM, "keeps_end_token", True)
    assert trtllm(folder, backend).sample(prompts, SAMPLED) == without


def test_a_request_whose_sequences_end_at_different_steps_names_the_last_ones_reason_only(
    stand_in: None, folder: Path, prompts: Prompts
) -> None:
    """As 1.2 does; the sampler tells the others' ends by their tokens, and the contract above holds."""
    from tensorrt_llm import LLM, SamplingParams

    llm = LLM(model=str(folder), skip_tokenizer_init=True)
    params = SamplingParams(
        end_id=EOS, stop_token_ids=list(END_IDS[1:]), n=3, temperature=1.0, max_tokens=20, detokenize=False
    )
    answers = [answer.outputs for answer in llm.generate([list(prompt) for prompt in prompts], params)]
    assert {sum(one.finish_reason is None for one in outputs) for outputs in answers} == {2}
    assert {one.stop_reason for outputs in answers for one in outputs} == {None, END_IDS[1]}
    for one in (one for outputs in answers for one in outputs if END_IDS[1] in one.token_ids):
        assert one.finish_reason is None and one.token_ids[-1] == END_IDS[1]


def test_one_request_per_prompt_with_n_and_the_seeds_of_its_copies(
    stand_in: None, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm import LLM, SamplingParams

    seen: list[SamplingParams] = []
    generate = LLM.generate

    def spy(self: LLM, inputs: object, params: list[SamplingParams], use_tqdm: bool) -> object:
        seen.extend(params)
        return generate(self, inputs, params, use_tqdm)

    monkeypatch.setattr(LLM, "generate", spy)
    sampled = trtllm(folder).sample(prompts, SAMPLED)
    assert [params.n for params in seen] == [3] * len(prompts)
    assert [[one.seed for one in group] for group in sampled] == [
        [params.seed + copy for copy in range(3)] for params in seen
    ]
    assert {(params.max_tokens, params.temperature, params.top_p) for params in seen} == {(20, 1.0, 0.9)}
    trtllm(folder).sample(prompts[:1], GREEDY)
    assert (seen[-1].temperature, seen[-1].top_p, seen[-1].top_k) == (None, None, 1)


def test_log_probabilities_are_kept_where_the_backend_gives_them(
    stand_in: None, folder: Path, prompts: Prompts
) -> None:
    for completion in flat(trtllm(folder).sample(prompts, SAMPLED)):
        assert completion.cumulative_logprob == pytest.approx(-3.4657 * len(completion.token_ids), abs=1e-2)
    engine = flat(trtllm(folder, "trtllm_engine").sample(prompts, SAMPLED))
    assert {completion.cumulative_logprob for completion in engine} == {None}


def test_an_answer_that_broke_off_is_no_completion(
    stand_in: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm import LLM

    sequence = LLM._sequence

    def cancelled(self: LLM, *arguments: object) -> object:
        output = sequence(self, *arguments)
        output.finish_reason = "cancelled"
        return output

    monkeypatch.setattr(LLM, "_sequence", cancelled)
    with pytest.raises(RuntimeError, match="cancelled"):
        trtllm(folder).sample([(3,)], SAMPLED)


def test_an_engine_that_is_absent_or_of_another_version_is_refused(stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine.json.*trtllm_torch"):
        trtllm(tmp_path / "huggingface", "trtllm_engine")
    (tmp_path / "engine").mkdir()
    write_record(tmp_path / "engine", replace(ENGINE, tensorrt_llm="1.1.0", gpu_sm="8.0"))
    with pytest.raises(UserError, match=r"tensorrt_llm 1.1.0 there and 1.2.1\+stand.in here, gpu_sm 8.0 there and 9.0"):
        trtllm(tmp_path / "huggingface", "trtllm_engine")
