"""`srlm bench sampling`: tokens counted by hand, and the command as users start it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from sampler_contract import END_IDS, GREEDY, SAMPLED, make_model, random_prompts
from sampling_run import CANDIDATES, begin_run, finish_stage
from transformers import AutoModelForCausalLM

from srlm_mega.sampling.huggingface_sampler import HuggingFaceSampler
from srlm_mega.tools.bench_record import read_record
from srlm_mega.tools.bench_sampler_process import Figures
from srlm_mega.tools.bench_sampling import ONE_BY_ONE, Sample, every_copy_alone, generate, part_rows, rates


def test_generates_tokens_are_counted_up_to_the_end_token(tmp_path: Path) -> None:
    """Greedy, the baseline and ours give the same tokens, so they must count the same."""
    make_model(tmp_path)
    model, prompts = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), random_prompts()
    sampler = HuggingFaceSampler(tmp_path, END_IDS, "cpu", 16)
    ours = [len(one.token_ids) for (one,) in sampler.sample(prompts, GREEDY)]
    assert min(ours) < GREEDY.max_new_tokens, "without a stop there is nothing to count wrong"
    one_token = replace(SAMPLED, n=1, temperature=1e-4, top_p=0.01)  # as good as greedy
    for batch in (1, 5):
        assert generate(model, END_IDS, prompts, one_token, batch).output_tokens == sum(ours)
    torch.manual_seed(0)
    assert (
        generate(model, END_IDS, prompts, SAMPLED, 4).output_tokens < len(prompts) * SAMPLED.n * SAMPLED.max_new_tokens
    )


def test_copies_alone_are_as_many_completions() -> None:
    prompts, params = every_copy_alone([(1,), (2, 3)], SAMPLED)
    assert prompts == [(1,)] * 3 + [(2, 3)] * 3 and params == replace(SAMPLED, n=1)


def test_rates_by_hand() -> None:
    samples = [
        Sample(repetition, method, part, 1, 1, 1, Figures(tokens), seconds)
        for repetition, method, part, tokens, seconds in (
            (0, "a", "x", 10, 1.0), (0, "a", "y", 50, 2.0), (0, "b", "x", 99, 9.0), (1, "a", "x", 5, 1.0)
        )
    ]  # fmt: skip
    assert rates(samples, "a") == [20, 5]


def test_what_an_engine_counts_by_hand() -> None:
    figures = Figures(output_tokens=10, steps=4, at_work=20, prompt_tokens=50, cached_tokens=30)
    rows = {row.name: row.samples for row in part_rows([Sample(0, "e", "x", 1, 1, 1, figures, 1.0)])}
    assert rows["completions at work of x, e"] == (5.0,) and rows["reused prompt tokens of x, e"] == (0.6,)


def test_the_command(srlm: Path, tmp_path: Path) -> None:
    small = ["candidates.max_new_tokens=8", "judge.max_new_tokens=8", "sampler.batch_size=32"]
    run = begin_run(tmp_path / "run", ["list 2 animals", "list 3 colors upper"], *small)
    finish_stage(run, CANDIDATES)
    out = tmp_path / "bench.json"
    argv = [
        srlm,
        "bench",
        "sampling",
        run.root,
        "--prompts",
        "2",
        "--repetitions",
        "2",
        "--batch-size",
        "4",
        "--json",
        out,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(out)
    methods = {"srlm", "srlm, every copy prefilled", "srlm, batch_size=4", "generate, request by request",
               "generate, fixed batches"}  # fmt: skip
    assert {row.name.removeprefix("rate of ") for row in record.rows if row.unit == "tokens/s"} == methods
    ratios = {row.name.removeprefix("faster than ") for row in record.rows if row.unit == "ratio"}
    assert ratios == methods - {"srlm"}
    timed = [row for row in record.rows if row.unit == "s"]
    assert len(timed) == 2 * len(methods) and all(len(row.samples) == 2 for row in timed), "parts, methods, repetitions"
    sequences = {(row.labels["method"] == ONE_BY_ONE, row.extra["sequences"]) for row in timed}
    assert sequences == {(False, 2 * 4), (False, 8 * 3), (True, 1 * 4), (True, 1 * 3)}
    tokens = [sum(record.row(f"output tokens of {part}, srlm").samples) for part in ("candidates", "judgements")]
    assert min(tokens) > 0 and 3 < record.settings["prefill_saving"] < 4
    assert "CPU" in record.device and record.versions["torch"]
    assert "srlm is faster by" in done.stdout
    argv = [srlm, "bench", "sampling", run.root, "--prompts", "2", "--repetitions", "1", "--json", out]
    other = [*argv, "--backend", "huggingface", f"sampler.python={sys.executable}"]
    done = subprocess.run(other, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(out)
    assert {row.name for row in record.rows if row.unit == "ratio"} == {
        "faster than srlm, every copy prefilled", "faster than huggingface"
    }  # fmt: skip
    for part in ("candidates", "judgements"):  # the same backend in a process of its own
        ours, theirs = (record.row(f"output tokens of {part}, {name}").samples for name in ("srlm", "huggingface"))
        assert ours == theirs
    alone = subprocess.run([*argv, "--backend", "vllm"], capture_output=True, text=True)
    assert alone.returncode == 2 and "--backend vllm needs its environment: sampler.python" in alone.stderr
    absent = subprocess.run([srlm, "bench", "sampling", tmp_path], capture_output=True, text=True)
    assert absent.returncode == 2 and "not a run folder" in absent.stderr
