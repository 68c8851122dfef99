"""The log-probabilities of sampler and trainer for the same tokens: by hand, by one model on both sides, and by engines
that compute something else."""

import math
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from places import TOY
from safetensors.torch import load_file, save_file
from sampling_run import CANDIDATES, JUDGEMENTS, begin_run, with_files, write_model

from srlm_mega.config.file import load_config
from srlm_mega.config.rounds import LOGPROB_LIMITS, HealthConfig
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import CANNOT_CONTINUE
from srlm_mega.evaluation.health_limits import read_health, sampler_health
from srlm_mega.evaluation.logprob_difference import logprob_differences
from srlm_mega.judging.pairs import Ranked, preference_pair
from srlm_mega.records import (
    Candidate,
    Judgement,
    MetaJudgement,
    PreferencePair,
    PromptDraft,
    ReferenceLogprobs,
    parse_line,
    read_jsonl,
    write_jsonl,
)
from srlm_mega.report.status import read_status
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling import huggingface_sampler
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.run_stages import run_stage

PAIRS, REFERENCE = "round_1/pairs", "round_1/reference"
ONE_RANK = ("parallel.pipeline_model_parallel_size=1", "launch.processes_per_node=1")
PROMPTS = [f"list {number % 7 + 1} animals upper please" for number in range(8)]


def pair(name: str, chosen: float | None, rejected: float | None) -> PreferencePair:
    """A pair whose chosen response has 2 tokens, and its rejected one 4."""
    ids = ((1,), (5, 2), (6, 7, 8, 2))
    return PreferencePair(name, (), (), (), f"{name}-c", f"{name}-r", 5, 1, *ids, 1.0, chosen, rejected)


def test_differences_by_hand() -> None:
    """|-3.0 + 3.5| / 2, |-8.0 + 6.0| / 4; |-1.0 + 1.0| / 2. What one side has no sum of is left out: anchors,
    judgements, pairs too long to be trained on."""
    pairs = [pair("a", -3.0, -8.0), pair("b", -1.0, None), pair("meta", None, None), pair("long", -9.0, -9.0)]
    trainer = [("a", -3.5, -6.0), ("b", -1.0, -70.0), ("meta", -2.0, -2.0)]
    differences = logprob_differences(pairs, [ReferenceLogprobs(*one) for one in trainer])
    older = orjson.loads(orjson.dumps(pairs[2]))
    del older["chosen_logprob"], older["rejected_logprob"]
    assert parse_line(PreferencePair, orjson.dumps(older)) == pairs[2], "of a version whose pairs had none"
    assert differences == [0.25, 0.5, 0.0]
    health = sampler_health(3, differences, HealthConfig(), "fp32")
    assert [figure.value for figure in health.figures.values()] == [0.25, 0.5]
    assert (health.round, health.state) == (3, "stop")


def test_limits_follow_the_precision_and_can_be_given() -> None:
    def state(difference: float, precision: str, **given: dict[str, float | str | None]) -> str:
        limits = HealthConfig.model_validate({f"logprob_difference_{key}": value for key, value in given.items()})
        return sampler_health(1, [difference], limits, precision).state  # type: ignore[arg-type]

    for precision, (mean, _) in LOGPROB_LIMITS.items():
        assert mean.warn is not None and mean.stop is not None and mean.warn < mean.stop
        assert [state(bound, precision) for bound in (mean.warn, mean.stop, 1.01 * mean.stop)] == [
            "fine",
            "warn",
            "stop",
        ]
    assert state(0.015, "fp32") == "stop" and state(0.015, "bf16") == state(0.05, "fp8") == "fine"
    assert state(0.015, "fp32", mean={"stop": None}) == "warn"
    assert state(0.015, "fp32", mean={"stop": None, "warn": None}, max={"warn": None}) == "fine"
    assert state(0.015, "fp32", mean={"stop": 0.5, "warn": 0.2}, max={"warn": "auto"}) == "warn", "the largest one"
    assert state(math.nan, "fp8") == "stop", "a GPU that computes nothing"
    assert sampler_health(1, [], HealthConfig(), "bf16").figures["logprob_difference_mean"].state == "unknown"


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ((), "fp32"),
        (("trainer.bf16=true",), "bf16"),
        (("sampler.backend=trtllm_torch",), "bf16"),
        (("sampler.backend=trtllm_torch", "sampler.quantization=fp8"), "fp8"),
        (("sampler.backend=trtllm_torch", "sampler.kv_cache_dtype=fp8"), "fp8"),
    ],
)
def test_the_coarser_precision_counts(overrides: tuple[str, ...], precision: str) -> None:
    assert load_config(TOY, overrides).logprob_precision == precision


def test_only_responses_of_the_rounds_model_are_compared() -> None:
    own = Candidate("a", "p", "why?", "x", "stop", 0, "M1", (1,), (5, 2), -3.0)
    anchor = replace(own, id="b", text="y", model_hash="M0", token_ids=(6, 2), cumulative_logprob=-4.0)
    made = preference_pair(Ranked(5.0, own, None), Ranked(1.0, anchor, None), 1.0)
    assert (made.chosen_logprob, made.rejected_logprob) == (-3.0, None)
    both = preference_pair(Ranked(5.0, own, None), Ranked(1.0, replace(anchor, model_hash="M1"), None), 1.0)
    assert (both.chosen_logprob, both.rejected_logprob) == (-3.0, -4.0)


@pytest.mark.parametrize("kind", [PromptDraft, Judgement, MetaJudgement])
def test_records_of_older_versions_are_read(kind: type[PromptDraft | Judgement | MetaJudgement]) -> None:
    ids = ("request", "candidate_id", "first_id", "second_id", "id", "text", "model_hash")
    fields = {key: "x" for key in ids if key in kind.__dataclass_fields__}
    decoding = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9, "stop": []}
    fields |= {"finish_reason": "stop", "seed": 3, "token_ids": [5, 2], "decoding": decoding}  # type: ignore[dict-item]
    fields |= {key: None for key in ("score", "verdict") if key in kind.__dataclass_fields__}  # type: ignore[misc]
    old = parse_line(kind, orjson.dumps(fields | {"cumulative_logprob": -2.5}))
    assert old == parse_line(kind, orjson.dumps(fields)) and b"logprob" not in orjson.dumps(old)
    with pytest.raises(ValueError, match="logprobs"):
        parse_line(kind, orjson.dumps(fields | {"logprobs": -2.5}))


def sampled_run(folder: Path, *overrides: str) -> RunDir:
    """A run with a random M1, its candidates, and pairs of each prompt's first two."""
    run = begin_run(folder, PROMPTS, *ONE_RANK, "candidates.max_new_tokens=12", *overrides)
    config = load_config(run.config_file)
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, CANDIDATES)) == 0
    by_prompt: dict[str, list[Ranked]] = {}
    for candidate in read_jsonl(run.output(CANDIDATES) / "candidates.jsonl", Candidate):
        by_prompt.setdefault(candidate.prompt_id, []).append(Ranked(1.0, candidate, None))
    pairs = [preference_pair(first, second, 1.0) for first, second, *_ in by_prompt.values()]
    with_files(run, config, PAIRS, lambda out: write_jsonl(out / "pairs.jsonl", pairs))
    return run


def refer(run: RunDir, *overrides: str) -> tuple[int, str]:
    """Run stage reference; exit code and message."""
    config = load_config(run.config_file, overrides)
    code = run_stage(run, Samplers(config, run.replicas), find_stage(config, REFERENCE))
    return code, read_progress(run.progress_file(REFERENCE)).message if code else ""


def test_sampler_and_trainer_of_one_model_agree(tmp_path: Path) -> None:
    """To the four decimals that the sampler's sums have, and fp32's rounding. Cut responses are in it: the trainer
    scores the tokens that there are."""
    run = sampled_run(tmp_path / "run")
    candidates = list(read_jsonl(run.output(CANDIDATES) / "candidates.jsonl", Candidate))
    assert {one.finish_reason for one in candidates} >= {"length"}
    assert refer(run) == (0, "")
    manifest, health = run.manifest(REFERENCE), read_health(run, 1)
    assert manifest is not None and health is not None and health.state == "fine"
    assert manifest.counts["compared"] == 2 * len(PROMPTS) and manifest.counts["warnings"] == 0
    mean, largest = (health.figures[f"logprob_difference_{key}"].value for key in ("mean", "max"))
    assert mean is not None and largest is not None and 0 < mean <= largest < 1e-4
    assert manifest.counts["logprob_difference_mean"] == mean and manifest.counts["logprob_difference_max"] == largest


def tempered(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """An engine's log-probabilities after the temperature."""
    return (logits.float() / 0.7).log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].double()


def remade(run: RunDir, scale: float, seed: int = 1) -> None:
    """M1 made again after it was sampled: the sampler had one matrix by this factor smaller, as a wrong FP8 scale
    makes it, or had the weights of another seed."""

    def write(folder: Path) -> None:
        write_model(config, folder / "huggingface", toy_tokenizer(), seed)
        path = folder / "huggingface/model.safetensors"
        weights = load_file(path)
        weights["model.layers.0.mlp.down_proj.weight"] *= scale
        save_file(weights, path, {"format": "pt"})

    config = load_config(run.config_file)
    run.remove("M1")
    with_files(run, config, "M1", write)


@pytest.mark.parametrize(("scale", "seed"), [(1.0, 2), (2.0, 1)])
def test_other_weights_stop_the_round_before_it_trains(tmp_path: Path, scale: float, seed: int) -> None:
    run = sampled_run(tmp_path / "run")
    remade(run, 1.0)
    assert refer(run) == (0, ""), "the same weights made again"
    run.remove(REFERENCE)
    remade(run, scale, seed)
    code, message = refer(run)
    kept = run.partial(REFERENCE) / "health.json"
    assert code == CANNOT_CONTINUE and str(kept) in message and "(logprob_difference_mean, stop at 0.01)" in message
    for cause in ("other weights", "FP8 scales", "chat template", "temperature", "GPU"):
        assert cause in message
    assert run.manifest(REFERENCE) is None and (run.partial(REFERENCE) / "reference.jsonl").is_file()
    health = read_health(run, 1)
    assert health is not None and health.state == "stop"
    assert refer(run, "health.logprob_difference_mean.stop=null") == (0, ""), "as the message says"
    assert "health.logprob_difference_mean.stop=null" in message
    after = read_health(run, 1)
    assert after is not None and after.state == "warn" and after.figures.keys() == health.figures.keys()


def test_sums_after_the_temperature_stop_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_sampler, "logprob_of", tempered)
    code, message = refer(sampled_run(tmp_path / "run"))
    assert code == CANNOT_CONTINUE and "after temperature" in message


def test_a_sampler_that_is_not_asked_gives_no_figure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = sampled_run(tmp_path / "run", "sampler.logprobs=false")
    candidates = list(read_jsonl(run.output(CANDIDATES) / "candidates.jsonl", Candidate))
    assert {one.cumulative_logprob for one in candidates} == {None}
    assert refer(run) == (0, "")
    assert "sampler and trainer were not compared" in capfd.readouterr().out
    manifest, health = run.manifest(REFERENCE), read_health(run, 1)
    assert manifest is not None and manifest.counts == {"warnings": 0, "compared": 0}
    assert health is not None and {figure.state for figure in health.figures.values()} == {"unknown"}


def test_only_candidates_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    decode = huggingface_sampler.HuggingFaceSampler._decode

    def spy(self: object, prompts: object, params: SamplingParams, seeds: object) -> object:
        asked.append(params.logprobs)
        return decode(self, prompts, params, seeds)

    monkeypatch.setattr(huggingface_sampler.HuggingFaceSampler, "_decode", spy)
    run = sampled_run(tmp_path / "run")
    assert set(asked) == {True}
    asked.clear()
    config = load_config(run.config_file)
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, JUDGEMENTS)) == 0
    assert set(asked) == {False}


def test_the_health_of_a_round_is_that_of_its_data_and_of_its_sampler(tmp_path: Path) -> None:
    """Of a round of an older version, or without a reference, it is that of its data alone."""
    run = sampled_run(tmp_path / "run")
    figure = {"value": 0.3, "warn": 0.2, "stop": None, "state": "warn"}
    record = orjson.dumps({"round": 1, "state": "warn", "figures": {"tie_rate": figure}})
    with_files(
        run, load_config(run.config_file), "round_1/health", lambda out: (out / "health.json").write_bytes(record)
    )
    assert read_status(run.root, {}).health[0].beyond == ("warn: tie_rate 0.3",)
    before = read_health(run, 1)
    assert before is not None and list(before.figures) == ["tie_rate"]
    remade(run, 1.0, seed=2)
    assert refer(run)[0] == CANNOT_CONTINUE
    health = read_health(run, 1)
    assert health is not None and health.state == "stop"
    assert list(health.figures) == ["logprob_difference_mean", "logprob_difference_max", "tie_rate"]
    beyond = read_status(run.root, {}).health[0].beyond
    assert beyond[0].startswith("stop: logprob_difference_mean ") and beyond[-1] == "warn: tie_rate 0.3"
