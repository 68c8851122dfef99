"""The contract of a sampler against vLLM itself, and what is vLLM's own. tests/sampling/test_vllm.py runs this file in
an environment that has it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
from sampler_contract import *  # noqa: F403
from sampler_contract import END_IDS, GREEDY, SAMPLED, Prompts, Ties, alphabet, flat, make_model, random_prompts
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from srlm_mega.chat import Chat, StopStrings
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.huggingface_sampler import HuggingFaceSampler
from srlm_mega.sampling.sampler import EngineDied, Request, Sampler, SamplingParams
from srlm_mega.sampling.vllm_sampler import VllmSampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_GAP = 0.25  # two steps of bf16 between logits of 16 and 32
FOREVER = (Request((3, 4), SAMPLED, position) for position in count())


def config(**settings: object) -> SamplerConfig:
    return SamplerConfig.model_validate({"backend": "vllm", "device": "cpu", "batch_size": 64, **settings})


@pytest.fixture(scope="module", params=list(DTYPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_model(path, head_size=32, dtype=DTYPES[request.param])
    return path


@pytest.fixture(scope="module")
def ties(folder: Path) -> Ties:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Ties() if folder.name.startswith("fp32") else Ties(BF16_GAP, model)


@pytest.fixture(scope="module")
def sampler(folder: Path) -> Iterator[Sampler]:
    sampler = open_sampler(config(), folder, END_IDS)
    yield sampler
    sampler.close()


def test_greedy_answers_are_those_of_transformers(sampler: Sampler, folder: Path, prompts: Prompts, ties: Ties) -> None:
    theirs = HuggingFaceSampler(folder, END_IDS, "cpu", batch_size=64)
    expected = [replace(one, seed=0) for one in flat(theirs.sample(prompts, GREEDY))]
    ties.check([replace(one, seed=0) for one in flat(sampler.sample(prompts, GREEDY))], expected, prompts)


@pytest.mark.parametrize("stop", [None, ("a", "be", "é")])
def test_log_probabilities_are_the_models(
    sampler: Sampler, folder: Path, prompts: Prompts, stop: tuple[str, ...] | None
) -> None:
    """Summed over what is kept, before temperature and top-p; and only where they are asked for."""
    strings = None if stop is None else StopStrings(alphabet(), stop)
    params = replace(SAMPLED, temperature=0.7, stop=strings, logprobs=True)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tolerance = 1e-3 if folder.name.startswith("fp32") else BF16_GAP
    for prompt, group in zip(prompts, sampler.sample(prompts, params), strict=True):
        for completion in group:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(dim=-1)[range(len(completion.token_ids)), list(completion.token_ids)]
            assert completion.cumulative_logprob == pytest.approx(
                chosen.sum().item(), abs=tolerance * len(completion.token_ids)
            )
    without = flat(sampler.sample(prompts, replace(params, logprobs=False)))
    assert {one.cumulative_logprob for one in without} == {None}
    assert without == flat(sampler.sample(prompts, params))


def test_decoding_ends_with_a_stop_string(sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy for itself, and not at the token limit."""
    answer = sampler.sample([(3,)], SAMPLED)[0]
    longest = max(answer, key=lambda one: len(one.token_ids))
    assert len(longest.token_ids) > 10
    first = alphabet().decode(list(longest.token_ids[:1]))
    steps = []
    monkeypatch.setattr(sampler, "_step", lambda step=sampler._step: steps.append(step()))
    stopped = sampler.sample([(3,)], replace(SAMPLED, stop=StopStrings(alphabet(), (first,))))[0]
    assert len(steps) == max(len(one.token_ids) for one in stopped)
    assert stopped[answer.index(longest)].token_ids == longest.token_ids[:1]


def test_requests_are_taken_while_there_is_room(sampler: Sampler) -> None:
    taken: list[int] = []
    stream = sampler.stream(Request((3, 4), SAMPLED, taken.append(place) or place) for place in count())  # type: ignore[func-returns-value]
    for answered in range(1, 60):
        next(stream)
        assert answered < len(taken) <= answered + 64 // SAMPLED.n + 1 + 64
    stream.close()  # type: ignore[attr-defined]
    assert len(sampler.sample([(3,)], GREEDY)) == 1


def test_two_streams_at_a_time(sampler: Sampler, prompts: Prompts, ties: Ties) -> None:
    """As when a caller asks again, alone, for what failed in a stream that goes on."""
    expected = sampler.sample(prompts, SAMPLED)
    stream = sampler.stream(Request(prompt, SAMPLED, place) for place, prompt in enumerate(prompts))
    answers = [next(stream)]
    ties.check(flat(sampler.sample(prompts[3:5], SAMPLED, first=3)), flat(expected[3:5]))
    answers += stream
    assert {one.request.position for one in answers} == set(range(len(prompts)))
    for one in answers:
        ties.check(one.completions, expected[one.request.position])


def test_a_request_that_vllm_refuses_costs_its_own_answer(
    sampler: VllmSampler, prompts: Prompts, ties: Ties, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    expected = sampler.sample(prompts, SAMPLED)
    engine, add, calls = sampler._engine, sampler._engine.add_request, count()

    def refuse_one(*arguments: object) -> object:
        if next(calls) == 4:  # the second copy of the second request
            raise VLLMValidationError("not this one")
        return add(*arguments)

    monkeypatch.setattr(engine, "add_request", refuse_one)
    answers = list(sampler.stream(Request(prompt, SAMPLED, place) for place, prompt in enumerate(prompts)))
    assert {one.request.position: one.error for one in answers if one.error} == {
        1: "vLLM refused the request: not this one"
    }
    for one in answers:
        if not one.error:
            ties.check(one.completions, expected[one.request.position])
    monkeypatch.setattr(engine, "add_request", add)
    assert not engine.has_unfinished_requests()


def test_an_engine_whose_step_fails_is_dead(sampler: VllmSampler) -> None:
    class Broken:
        """An engine after its GPU has failed."""

        def add_request(self, *arguments: object) -> None: ...

        def step(self) -> None:
            raise torch.OutOfMemoryError("no memory")

    dead = VllmSampler(Broken(), END_IDS, sampler._limits, 4)  # type: ignore[arg-type]
    with pytest.raises(EngineDied, match="OutOfMemoryError: no memory"):
        dead.sample([(3,)], GREEDY)
    with pytest.raises(EngineDied, match="before"):
        list(dead.stream(iter([Request((3,), GREEDY, 0)])))


def test_heads_that_a_cpu_does_not_have_are_refused_before_loading(tmp_path: Path) -> None:
    make_model(tmp_path, head_size=16)
    with pytest.raises(UserError, match=r"heads of size 16; on a CPU vLLM has 32, 64, .*backend=huggingface"):
        open_sampler(config(), tmp_path, END_IDS)
    with pytest.raises(UserError, match=r"sampler\.device=cuda: .* pip install vllm$"):
        open_sampler(config(device="cuda"), tmp_path, END_IDS)
    settings = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "modelopt"}}))
    with pytest.raises(UserError, match=r"is quantized, and vLLM on a CPU has no kernel .*sampler\.quantization"):
        open_sampler(config(), tmp_path, END_IDS)


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    return [one for one in process.children(recursive=True) if one.name().startswith("VLLM")]


def ended(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_ranks_answer_as_one_does_and_one_that_is_killed_ends_the_engine(tmp_path: Path) -> None:
    make_model(tmp_path, head_size=32)
    prompts = random_prompts()
    alone = open_sampler(config(), tmp_path, END_IDS)
    expected = flat(alone.sample(prompts, GREEDY))
    alone.close()
    sampler = open_sampler(config(tp_size=2, num_devices=2), tmp_path, END_IDS)
    Ties(1e-3, LlamaForCausalLM.from_pretrained(tmp_path)).check(
        flat(sampler.sample(prompts, GREEDY)), expected, prompts
    )
    ranks = ranks_of(psutil.Process())
    assert len(ranks) == 2
    with pytest.raises(EngineDied):
        for number, _ in enumerate(sampler.stream(FOREVER)):
            if number == 10:
                ranks[1].kill()
    assert ended(ranks, 30)
    with pytest.raises(EngineDied):
        sampler.sample([(3,)], GREEDY)
    sampler.close()


CLIENT = """
import sys
from pathlib import Path
from vllm_real import END_IDS, FOREVER, config, open_sampler
if __name__ == "__main__":
    for _ in open_sampler(config(tp_size=2, num_devices=2), Path(sys.argv[1]), END_IDS).stream(FOREVER):
        print("answered", flush=True)
"""


def test_ranks_die_with_their_client(tmp_path: Path) -> None:
    make_model(tmp_path, head_size=32)
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    client = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert client.stdout is not None
    while b"answered" not in (line := client.stdout.readline()):
        assert line, "it ended before its first answer"
    ranks = ranks_of(psutil.Process(client.pid))
    assert len(ranks) == 2
    client.kill()
    client.wait()
    assert ended(ranks, 30)


@pytest.mark.skipif("SRLM_VLLM_MODEL" not in os.environ, reason="SRLM_VLLM_MODEL names no folder of a real model")
def test_a_real_model() -> None:
    """SmolLM2 in bf16: greedy answers are transformers', a prefix is computed once, stop strings end it."""
    folder = Path(os.environ["SRLM_VLLM_MODEL"])
    chat = Chat.from_folder(folder)
    question = "Write a short list of things that a person takes along on a journey to the north: "
    prompts = [chat.prompt(f"{question * 3} begin with the letter {letter}.") for letter in "ABCDEFGH"]
    sampler = open_sampler(config(), folder, chat.end_ids)
    assert isinstance(sampler, VllmSampler)
    greedy = SamplingParams(1, 0.0, 1.0, max_new_tokens=24, seed=0)
    found = flat(sampler.sample(prompts, greedy))
    theirs = HuggingFaceSampler(folder, chat.end_ids, "cpu", batch_size=8)
    expected = [
        replace(one, seed=seed.seed) for one, seed in zip(flat(theirs.sample(prompts, greedy)), found, strict=True)
    ]
    Ties(BF16_GAP, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).check(found, expected, prompts)
    drawn = SamplingParams(4, 0.7, 0.9, max_new_tokens=24, seed=1, logprobs=True)
    before = replace(sampler.counts)
    first = sampler.sample(prompts, drawn)
    prompt_tokens = sampler.counts.prompt_tokens - before.prompt_tokens
    cached_tokens = sampler.counts.cached_tokens - before.cached_tokens
    assert prompt_tokens == 4 * sum(map(len, prompts)) and cached_tokens >= 0.6 * prompt_tokens
    assert all(one.cumulative_logprob is not None and one.cumulative_logprob < 0 for one in flat(first))
    assert [[one.token_ids for one in group] for group in sampler.sample(prompts, drawn)] == [
        [one.token_ids for one in group] for group in first
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for one in flat(sampler.sample(prompts, replace(drawn, stop=StopStrings(tokenizer, ("e", "1."))))):
        text = tokenizer.decode(list(one.token_ids))
        assert one.finish_reason == (
            "stop" if "e" in text or "1." in text or one.token_ids[-1] in chat.end_ids else "length"
        )
        assert "e" not in tokenizer.decode(list(one.token_ids[:-1]))
    sampler.close()
