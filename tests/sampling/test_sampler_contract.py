"""The contract against every backend that can run here; TensorRT-LLM's against a stand-in, which is not the real one.
For the real one see tests/gpu."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file
from sampler_contract import *  # noqa: F403
from sampler_contract import END_IDS, EOS, GREEDY, POSITIONS, SAMPLED, VOCABULARY, Prompts, flat, make_model
from trtllm_cases import Case, make_bf16_model, open_case

from srlm_mega.checkpoints_conversion.engine import EngineRecord, Limits, Runtime, write_record
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import EngineDied, Request, Sampler

STAND_IN = ROOT / "tests/support/tensorrt_llm_stand_in"
RUNTIME = Runtime("1.2.1+stand.in", "10.14.1", "9.0")
LIMITS = Limits(max_batch_size=256, max_num_tokens=POSITIONS, max_input_len=POSITIONS - 1, max_seq_len=POSITIONS)
ENGINE = EngineRecord(**asdict(RUNTIME), tp=1, pp=1, limits=LIMITS, model_hash="", scales_hash="", weights_hash="")
BACKENDS = ["huggingface, ", "trtllm_torch, 1.2", "trtllm_torch, 1.4", "trtllm_engine, 1.2"]
REFUSED, CANCELLED = 7, 8


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


@contextmanager
def playing(version: str) -> Iterator[None]:
    """The stand-in as the package `tensorrt_llm`, in one of its forms."""
    sys.path.insert(0, str(STAND_IN))
    try:
        with (
            patch("torch.cuda.get_device_capability", lambda: (9, 0)),
            patch.dict("os.environ", STAND_IN_VERSION=version),
        ):
            yield
    finally:
        sys.path.remove(str(STAND_IN))
        ours = "srlm_mega.sampling.trtllm_"
        for name in [name for name in sys.modules if name.startswith(("tensorrt", ours))]:
            del sys.modules[name]


@pytest.fixture
def stand_in() -> Iterator[None]:
    """The stand-in of 1.2."""
    with playing("1.2"):
        yield


@pytest.fixture(params=["1.2", "1.4"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """The stand-in, in each of its forms."""
    with playing(request.param):
        yield request.param


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request: pytest.FixtureRequest, folder: Path) -> Iterator[Sampler]:
    backend, _, version = request.param.partition(", ")
    loaded = folder.parent / "engine" if backend == "trtllm_engine" else folder
    config = SamplerConfig(backend=backend, device="cpu", batch_size=256)
    if version:
        with playing(version):
            sampler = open_sampler(config, loaded, END_IDS)
    else:
        sampler = open_sampler(config, loaded, END_IDS)
    yield sampler
    sampler.close()


def trtllm(folder: Path, backend: str = "trtllm_torch") -> Sampler:
    loaded = folder.parent / "engine" if backend == "trtllm_engine" else folder
    return open_sampler(SamplerConfig(backend=backend, batch_size=16), loaded, END_IDS)  # type: ignore[arg-type]


def test_the_stand_in_refuses_what_the_documentation_does_not_have(form: str, folder: Path) -> None:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    for wrong in (
        lambda: LLM(model=str(folder), skip_tokenizer_init=True, tp_size=2),
        lambda: SamplingParams(max_new_tokens=3),
        lambda: KvCacheConfig(reuse=True),
        lambda: LLM(model=str(folder), skip_tokenizer_init=True, cuda_graph_config={"padding": True}),
        lambda: SamplingParams(n=2),  # greedy: nothing says how to sample
        lambda: SamplingParams(n=2, temperature=0.0),
        lambda: SamplingParams(temperature=-0.1),
        lambda: SamplingParams(top_p=1.1),
        lambda: SamplingParams(top_k=-1),
        lambda: LLM(model=str(folder), skip_tokenizer_init=True).generate([[3]], SamplingParams()),
        lambda: LLM(model=str(folder), skip_tokenizer_init=True).generate([(3, 4)], SamplingParams(end_id=2)),
    ):
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_the_stand_in_takes_zeros_for_greedy(form: str) -> None:
    from tensorrt_llm import SamplingParams

    asked = ({}, {"top_k": 1}, {"temperature": 0.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.0})
    assert all(SamplingParams(**settings).greedy for settings in asked)
    assert not SamplingParams(temperature=1.0).greedy


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


def test_log_probabilities_are_asked_for_where_they_are_the_models_own(
    form: str, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler of 1.2 divides by the temperature first, and an engine has none."""
    from tensorrt_llm import LLM

    monkeypatch.setattr(LLM, "keeps_end_token", True)
    warm = replace(SAMPLED, temperature=0.7, logprobs=True)
    for params in (warm, replace(warm, logprobs=False)):
        for one in flat(trtllm(folder).sample(prompts, params)):
            expected = pytest.approx(-math.log(VOCABULARY) * len(one.token_ids), abs=1e-4)
            assert one.cumulative_logprob == (expected if form == "1.4" and params.logprobs else None)
    if form == "1.2":
        engine = flat(trtllm(folder, "trtllm_engine").sample(prompts, warm))
        assert {completion.cumulative_logprob for completion in engine} == {None}


def test_a_sum_of_log_probabilities_has_that_of_the_end_token(folder: Path, prompts: Prompts) -> None:
    """Where an answer leaves out the end token and its entry, there is no sum; a stop token's entry is there."""
    with playing("1.4"):
        sampler = trtllm(folder)
        found = {
            ended.token_ids[-1] if ended.finish_reason == "stop" else None: ended.cumulative_logprob is not None
            for ended in flat(sampler.sample(prompts, replace(SAMPLED, max_new_tokens=6, logprobs=True)))
        }
    assert found == {EOS: False, END_IDS[1]: True, None: True}


def test_the_stand_ins_log_probabilities_have_the_real_form(form: str, folder: Path) -> None:
    from tensorrt_llm import LLM, SamplingParams

    llm = LLM(
        model=str(folder), skip_tokenizer_init=True, **({"sampler_type": "TRTLLMSampler"} if form == "1.2" else {})
    )
    output = llm.generate([3], SamplingParams(end_id=EOS, temperature=0.5, logprobs=1, seed=1)).outputs[0]
    value = -math.log(VOCABULARY) * (2 if form == "1.2" else 1)
    assert [{token: one.logprob for token, one in entry.items()} for entry in output.logprobs] == [
        {token: pytest.approx(value)} for token in output.token_ids
    ]


def test_arguments_are_those_that_the_version_has(form: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm import LLM

    seen: list[LLM] = []
    start = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda self, **given: (seen.append(self), start(self, **given))[1])
    for options in ({}, {"tp_size": 2, "batch_wait_timeout_iters": None, "scheduler_policy": "GUARANTEED_NO_EVICT"}):
        config = SamplerConfig(backend="trtllm_torch", batch_size=48, **options)  # type: ignore[arg-type]
        open_sampler(config, folder, END_IDS).close()
    one, two = (llm.args for llm in seen)
    assert one.cuda_graph_config.enable_padding and one.cuda_graph_config.max_batch_size == 48
    assert (one.scheduler_config.capacity_scheduler_policy, two.scheduler_config.capacity_scheduler_policy) == (
        "MAX_UTILIZATION",
        "GUARANTEED_NO_EVICT",
    )
    assert (one.allreduce_strategy, two.allreduce_strategy) == ("AUTO", "NCCL")
    assert (one.batch_wait_timeout_iters, one.batch_wait_max_tokens_ratio) == (32, 0.5)
    assert (two.batch_wait_timeout_iters, two.batch_wait_max_tokens_ratio) == (0, 0.5)
    assert ("sampler_type" in type(one).model_fields) == (form == "1.2")


def test_an_answer_that_broke_off_is_no_completion(
    form: str, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, cancelled_token=CANCELLED)
    sampler = trtllm(folder)
    with pytest.raises(RuntimeError, match="cancelled"):
        sampler.sample([(CANCELLED,)], SAMPLED)
    one_request_fails(sampler, prompts, CANCELLED, "cancelled")


def test_a_request_that_fails_costs_itself(
    form: str, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, refused_token=REFUSED)
    sampler = trtllm(folder)
    with pytest.raises(RuntimeError, match="refused"):
        sampler.sample([(REFUSED,)], SAMPLED)
    one_request_fails(sampler, prompts, REFUSED, "refused this request")


def one_request_fails(sampler: Sampler, prompts: Prompts, token: int, message: str) -> None:
    """All requests are answered, and those with this token by the error."""
    answers = list(sampler.stream(requests_of(prompts)))
    assert sorted(answer.request.position for answer in answers) == list(range(len(prompts)))
    bad = [answer for answer in answers if token in answer.request.prompt]
    assert 0 < len(bad) < len(answers)
    assert all(message in answer.error and not answer.completions for answer in bad)
    assert all(len(answer.completions) == SAMPLED.n and not answer.error for answer in answers if answer not in bad)


def requests_of(prompts: Prompts) -> Iterator[Request]:
    return (Request(prompt, SAMPLED, position) for position, prompt in enumerate(prompts))


def fail(monkeypatch: pytest.MonkeyPatch, **failures: int) -> None:
    """Let the stand-in fail; whoever waits for an answer asks soon whether it lives."""
    from tensorrt_llm import LLM
    from tensorrt_llm.failures import Failures

    monkeypatch.setattr(LLM, "failures", Failures(**failures))
    monkeypatch.setattr("srlm_mega.sampling.trtllm_sampler.SILENCE", 0.1)


def test_a_dead_executor_is_no_bad_request(
    form: str, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 1.2 the requests in flight are never answered, so that somebody must ask."""
    fail(monkeypatch, dies_after=5)
    sampler, answered = trtllm(folder), []
    with pytest.raises(EngineDied, match=r"ended|died"):
        answered.extend(sampler.stream(requests_of(prompts * 3)))
    assert len(answered) <= 5 and not any(answer.error for answer in answered)
    for call in (lambda: sampler.sample(prompts, SAMPLED), lambda: list(sampler.stream(requests_of(prompts)))):
        with pytest.raises(EngineDied):
            call()
    sampler.close()


def test_requests_are_in_flight_together_and_no_more_than_the_engine_needs(
    form: str, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the batch: a request whose other sequences are done holds one place of its n."""
    fail(monkeypatch, hangs_after=0)
    taken: list[Request] = []

    def requests() -> Iterator[Request]:
        for request in requests_of(prompts * 9):
            taken.append(request)
            yield request

    sampler = trtllm(folder)  # 16 sequences at once
    stream = sampler.stream(requests())
    with patch.object(sampler, "_next", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        next(stream)
    assert len(taken) == 11  # 33 sequences of 32


def test_what_is_left_is_aborted_when_a_stream_ends_early(
    form: str, folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm import LLM

    fail(monkeypatch, hangs_after=2)
    seen = []
    ask = LLM.generate_async
    monkeypatch.setattr(LLM, "generate_async", lambda *given: (seen.append(ask(*given)), seen[-1])[1])
    for last in (None, Request((VOCABULARY,), SAMPLED, 9)):
        seen.clear()
        sampler = trtllm(folder)

        def requests(sampler: Sampler = sampler, last: Request | None = last) -> Iterator[Request]:
            yield from requests_of(prompts[:4])
            sampler._wait_for_aborts()  # type: ignore[attr-defined]  # they are asked for by then
            if last is not None:
                yield last

        stream = sampler.stream(requests())
        if last is None:
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(ValueError, match="vocabulary"):
                next(stream)
        sampler._wait_for_aborts()  # type: ignore[attr-defined]
        assert len(seen) == 4 and all(output.finished or output.aborted() for output in seen)
        sampler.close()


def test_the_stand_in_fails_and_waits_as_the_environment_says(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm.failures import Failures

    for name, value in {"DIES_AFTER": 3, "SLOW_START": 0.5, "FAILS_ONCE": tmp_path / "failed"}.items():
        monkeypatch.setenv(f"STAND_IN_{name}", str(value))
    assert Failures.of_environment() == Failures(dies_after=3, slow_start=0.5)
    assert Failures.of_environment() == Failures(slow_start=0.5), "another process has failed already"


def test_an_engine_says_that_its_backend_is_ending(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if form == "1.2":
        trtllm(folder, "trtllm_engine").close()
    else:
        with pytest.raises(UserError, match=r"1.4.0rc4\+stand.in loads no engines: .*trtllm_torch"):
            trtllm(folder, "trtllm_engine")
    assert "trtllm_engine is ending" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["one GPU", "two GPUs", "FP8"])
def test_what_the_gpu_tests_sample_is_made(stand_in: None, tmp_path: Path, case: Case) -> None:
    """Heads of 64 and sizes of 16s in bf16, which TensorRT-LLM's kernels know; the stand-in looks at neither."""
    folder = tmp_path / "huggingface"
    make_bf16_model(folder)
    found = json.loads((folder / "config.json").read_text())
    assert found["hidden_size"] // found["num_attention_heads"] == 64
    assert not any(found[name] % 16 for name in ("hidden_size", "intermediate_size", "vocab_size"))
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    sampler = open_case(case, folder)
    (answer,) = sampler.stream(iter([Request((3, 4), SAMPLED, 0)]))
    assert len(answer.completions) == SAMPLED.n
    sampler.close()


def test_an_engine_that_is_absent_or_of_another_version_is_refused(stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine.json.*trtllm_torch"):
        trtllm(tmp_path / "huggingface", "trtllm_engine")
    (tmp_path / "engine").mkdir()
    write_record(tmp_path / "engine", replace(ENGINE, tensorrt_llm="1.1.0", gpu_sm="8.0"))
    with pytest.raises(UserError, match=r"tensorrt_llm 1.1.0 there and 1.2.1\+stand.in here, gpu_sm 8.0 there and 9.0"):
        trtllm(tmp_path / "huggingface", "trtllm_engine")
