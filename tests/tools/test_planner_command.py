"""`srlm plan`: a configuration's stages, the search, and what is printed."""

import inspect
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
import yaml
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.cli.planner import plan as plan_cli
from srlm_mega.config.file import load_config
from srlm_mega.config.training import PackNumber, ParallelConfig
from srlm_mega.errors import UserError
from srlm_mega.gpus import find_gpu
from srlm_mega.run.plan import plan as stages_of
from srlm_mega.run.stage_kinds import Estimate
from srlm_mega.tools.gpu_file import chosen_gpu
from srlm_mega.tools.planner.advice import RUN_ADVICE, STEP_ADVICE, kind_of, step_advice
from srlm_mega.tools.planner.job import ParallelLayout
from srlm_mega.tools.planner.plan_command import PlanRequest, make_plan, planned, predictions, searched
from srlm_mega.tools.planner.points import CALIBRATION_FILE
from srlm_mega.tools.planner.sampler_memory import require_calibration_fits
from srlm_mega.tools.planner.search import COUNTS, search
from srlm_mega.tools.planner.show import MEMORY_PARTS, messages, options
from srlm_mega.tools.planner.training_steps import (
    PAIR_SPREAD,
    TERMS,
    Cut,
    Lengths,
    cut,
    layout_of,
    longest_job,
    training_job,
    typical_lengths,
)
from srlm_mega.tools.planner.whole_run import Requests, replica_of, requests_of
from srlm_mega.tools.rehearsal.longest_batches import longest_pairs
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.split import split
from srlm_mega.training.topology import Topology

CONFIGS = Path("launch/configs")
LENGTHS = Lengths()
ENGINE = "transformer_engine"


def request(name: str = "llama2_70b_64gpu.yaml", *overrides: str, gpus: int | None = None) -> PlanRequest:
    return PlanRequest(CONFIGS / name, overrides, find_gpu("h100"), gpus, LENGTHS, price=2.0)


def test_every_stage_of_the_run_is_planned() -> None:
    config = request().config
    plan = make_plan(request())
    assert list(dict.fromkeys(time.name for time in plan.times)) == [stage.name for stage in stages_of(config)]
    assert all(time.seconds > 0 for time in plan.times)
    assert plan.gpu_hours == pytest.approx(64 * sum(time.seconds for time in plan.times) / 3600)
    assert plan.fits == "fits" and len(plan.memory) == 8


def test_vllm_is_planned_as_trtllm_torch_is() -> None:
    plans = [
        make_plan(request("llama2_70b_64gpu.yaml", f"sampler.backend={name}")) for name in ("vllm", "trtllm_torch")
    ]
    assert plans[0].times == plans[1].times


def test_stages_that_only_some_runs_have() -> None:
    everything = request(
        "llama2_70b_64gpu.yaml", "sampler.backend=trtllm_engine", "meta_judge.enabled=true", "pairs.consistency=true",
        "pairs.rejected_from=M1", "prompts.writer=current",
    )  # fmt: skip
    times = make_plan(everything).times
    assert list(dict.fromkeys(time.name for time in times)) == [stage.name for stage in stages_of(everything.config)]
    kinds = {time.name.rpartition("/")[2] for time in times}
    assert {"sft_baseline", "eft", "anchors", "anchor_judgements", "previous_judgements", "meta_judgements"} <= kinds
    engines = [time.name for time in times if time.what == "conversion, engine build"]
    assert engines == [f"{model}/sampler_weights" for model in ("sft_baseline", "M1", "M2", "M3")]
    positives = make_plan(request("llama2_70b_64gpu.yaml", "round.method=positives_sft")).times
    assert [time.what for time in positives if time.name == "M2"] == ["SFT on positives", "conversion"]
    assert [time.what for time in times if time.name == "sft_baseline"] == ["SFT on IFT", "conversion"]


def test_requests_by_hand() -> None:
    """5000 prompts of 4 candidates and 3 judgements; held out: a greedy and a sampled answer, 3 judgements a reply. A
    judge reads its template of 420 tokens, 120 of the prompt and 350 of the response."""
    config = request("llama2_70b_64gpu.yaml", "seed_data.num_test=0").config
    (file,) = requests_of(Estimate.PROMPTS, config, LENGTHS)
    assert (file.count, file.samples, file.output, file.cap) == (5000 / 4, 1, 480, 1024)
    assert requests_of(Estimate.CANDIDATES, config, LENGTHS) == [Requests(5000, 120, 4, 350, 2048)]
    assert requests_of(Estimate.JUDGEMENTS, config, LENGTHS) == [Requests(20_000, 890, 3, 140, 512)]
    answers, judgements = requests_of(Estimate.EVALUATION, config, LENGTHS)
    assert answers == Requests(config.seed_data.num_validation, 120, 2, 350, 2048)
    assert judgements == Requests(config.seed_data.num_eft_eval, 890, 3, 140, 512)
    random = request("llama2_70b_64gpu.yaml", "judge.backend=random").config
    assert requests_of(Estimate.JUDGEMENTS, random, LENGTHS) == []


SMALLER = (  # of the 64 GPUs' layout: two replicas of four stages
    "parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.data_parallel_size=2",
)  # fmt: skip


def test_a_dpo_step_by_hand() -> None:
    """16 pairs with a mean of 2 * 470 tokens, the longest 2,775. The fewest rows: one for each of two replicas, about
    half of 15,040 tokens; for four stages four each, none shorter than the longest pair; in multiples of 8 * TP. Of the
    responses' share, 350 / 470, log-probabilities are wanted."""
    config = request("llama2_70b_64gpu.yaml", *SMALLER).config
    gpu, layout = find_gpu("h100"), layout_of(config)
    job = training_job(config, config.dpo, layout, gpu, LENGTHS)
    assert config.dpo.packs == "auto"
    assert (job.seq_length, job.micro_batch, job.global_batch, job.micro_batches) == (2816, 1, 8, 4)
    assert job.attended_length == 470 and job.head_rows == pytest.approx(350 / 470 * 15_040 / (8 * 2816))
    fewest = config.dpo.model_copy(update={"packs": "fewest"})
    job = training_job(config, fewest, layout, gpu, LENGTHS)
    assert (job.seq_length, job.global_batch, job.micro_batches) == (7616, 2, 1)
    padded = config.dpo.model_copy(update={"packed_sequence_size": None})
    job = training_job(config, padded, layout, gpu, LENGTHS)
    assert (job.seq_length, job.micro_batch, job.micro_batches) == (1984, 2, 8)  # rows of the longest sequence, 1,947
    padded = padded.model_copy(update={"micro_batch_size": 3})
    assert training_job(config, padded, layout, gpu, LENGTHS).micro_batches == 3, "8 pairs, 3 at a time"
    interleaved = replace(layout, vpp=5)
    assert training_job(config, padded, interleaved, gpu, LENGTHS).micro_batches == 4, "whole groups of four"


def test_lengths_of_a_typical_batch() -> None:
    """Lognormal: the median is below the mean, the longest of 16 pairs 2.95 times it, and none is above the limit."""
    drawn = typical_lengths(940, PAIR_SPREAD, 16, 8190)
    assert sum(drawn) == pytest.approx(16 * 940, rel=1e-3) and drawn == tuple(sorted(drawn))
    assert drawn[7] < 750 and drawn[-1] == 2775
    assert max(typical_lengths(940, PAIR_SPREAD, 16, 2000)) == 2000


@pytest.mark.parametrize("packs", ["fewest", "auto", 3])
@pytest.mark.parametrize(
    "layout", [ParallelLayout(dp=2), ParallelLayout(pp=4), ParallelLayout(tp=2, pp=2, dp=2, vpp=3)]
)
def test_planner_rehearsal_and_trainer_count_the_same_packs(packs: PackNumber, layout: ParallelLayout) -> None:
    """Of a typical batch, and of the rehearsal's, whose pairs are the longest: two of them fill a pack."""
    config = request("llama2_7b_8gpu.yaml").config
    section = config.dpo.model_copy(update={"packs": packs, "packed_sequence_size": 2048})
    config = config.model_copy(update={"dpo": section, "model": config.model.model_copy(update={"seq_length": 512})})
    parallel = ParallelConfig(virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None)
    ranks = Topology(0, 1, torch.device("cpu"), 0, layout.tp, 0, layout.pp, 0, layout.dp, parallel)

    def trained(pairs: list[PairSequences]) -> Cut:
        made = split(pairs, section, ranks)
        return Cut(len(made.micro_batches) * layout.dp, made.num_rows, made.length)

    weights = typical_lengths(2 * 300, PAIR_SPREAD, 16, 2 * 511)
    sizes = [(size // 2, size - size // 2) for size in weights]
    chosen, rejected = ([TokenSequence("s", (1,) * (size[side] + 1), 1) for size in sizes] for side in (0, 1))
    typical = [PairSequences("p", *pair) for pair in zip(chosen, rejected, strict=True)]
    assert trained(typical) == cut(weights, section, layout)
    job = training_job(config, section, layout, find_gpu("h100"), LENGTHS)
    longest = longest_job(config, section, job)
    rehearsed = trained(longest_pairs(config))
    assert (rehearsed.micro_batches, rehearsed.length) == (longest.global_batch, longest.seq_length)


def test_more_replicas_sample_faster_and_more_steps_take_longer() -> None:
    def hours(plan_request: PlanRequest, name: str) -> float:
        return sum(time.hours for time in make_plan(plan_request).times if time.name == name)

    more = request(gpus=128)
    assert hours(more, "round_1/candidates") < hours(request(), "round_1/candidates")
    assert hours(more, "round_1/prompts") < hours(request(), "round_1/prompts"), "all replicas write the prompts"
    longer = request("llama2_70b_64gpu.yaml", "dpo.epochs=6")
    assert hours(longer, "M2") > 1.5 * hours(request(), "M2")
    assert hours(longer, "M1") == hours(request(), "M1")
    fewer = request("llama2_70b_64gpu.yaml", "judge.n=1")
    assert hours(fewer, "round_1/judgements") < hours(request(), "round_1/judgements")


def test_a_model_is_loaded_once_for_stages_that_follow_one_another() -> None:
    """90 s to start, and 70B's 138 GB at 2 GB/s; the judgements of M1, and those of its anchors, find it loaded."""
    overrides = ("pairs.rejected_from=M1", "pairs.consistency=true")
    times = {time.name: time.seconds for time in make_plan(request("llama2_70b_64gpu.yaml", *overrides)).times}
    load = 90 + 2 * request().config.model.sizes.parameters / 2e9
    first, second = (times[f"round_{t}/judgements"] for t in (1, 2))
    assert first == second == times["round_1/anchor_judgements"]
    assert times["round_2/anchor_judgements"] == first, "the anchor answers before M2 is loaded"
    assert times["round_2/previous_judgements"] == pytest.approx(first + load), "M1 judges again"
    assert times["round_1/candidates"] == pytest.approx(times["round_1/anchors"] - load)


def test_reserving_max_new_tokens_leaves_room_for_fewer_sequences() -> None:
    """2,168 tokens of each in place of those that it has so far: a third of the cache holds 78 instead of 256."""
    small = ("sampler.kv_cache_fraction=0.3",)
    reserved = (*small, "sampler.scheduler_policy=GUARANTEED_NO_EVICT")
    used, kept = (make_plan(request("llama2_70b_64gpu.yaml", *overrides)).times for overrides in (small, reserved))
    seconds = [[time.seconds for time in times if time.name == "round_1/candidates"] for times in (used, kept)]
    assert seconds[0] < seconds[1]


def test_gpus_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="--gpus 40 is not divisible by TP \\* PP \\* CP = 64"):
        make_plan(request(gpus=40))


def test_search_finds_only_what_fits_and_nothing_faster_is_left_out() -> None:
    config = request().config
    gpu = find_gpu("h100")
    found = search(config, gpu, LENGTHS, (64, 128))
    assert {each.gpus for each in found} == {64, 128}
    assert all((each.memory_gib <= gpu.memory_gib) == (each.fits == "fits") for each in found)
    assert all(each.layout.gpus == each.gpus for each in found)
    at_64 = [each.hours for each in found if each.gpus == 64]
    assert at_64 == sorted(at_64) and len(at_64) > 5
    assert found[0].gpu_hours == 64 * found[0].hours
    assert len({each.packs for each in found}) > 1, "packs are varied"
    small = search(config, find_gpu("a100"), LENGTHS, (8,))
    assert not small, "70B is not trained on eight A100s"


@pytest.mark.parametrize(("preset", "gpus"), [("llama2_70b_64gpu.yaml", 64), ("llama2_7b_8gpu.yaml", 8)])
def test_presets_carry_the_best_answer(preset: str, gpus: int) -> None:
    """The fastest run of those that fit is the preset's own, and its options make any other layout the same."""
    shipped = make_plan(request(preset))
    best = next(
        each for each in search(request(preset).config, shipped.cluster.gpu, LENGTHS, (gpus,)) if each.fits == "fits"
    )
    assert best.layout == shipped.job.layout and best.hours == pytest.approx(shipped.hours)
    assert shipped.step.total <= 0.6
    other = ("parallel.sequence_parallel=false", "trainer.recompute_granularity=full", "dpo.packs=1", "sft.packs=2")
    again = make_plan(request(preset, *other, *options(best).split()))
    assert (again.step, again.hours) == (best.step, best.hours)


@pytest.mark.parametrize(
    ("preset", "gpus"), [("llama2_70b_64gpu", 32), ("llama2_7b_8gpu", 3), ("llama2_7b_8gpu", 12), ("toy_cpu", 16)]
)
def test_the_options_that_the_search_prints_plan_what_it_found(preset: str, gpus: int) -> None:
    """As they are printed, for another number of GPUs than the configuration has."""
    asked = request(f"{preset}.yaml")
    found = search(asked.config, asked.gpu, LENGTHS, (gpus,))
    for each in (found[0], found[-1]):
        again = make_plan(replace(asked, overrides=tuple(options(each).split())))
        assert (again.cluster.gpus, again.cluster.layout) == (gpus, each.layout)
        assert (again.step, again.hours, again.fits) == (each.step, pytest.approx(each.hours), each.fits)


def test_the_search_is_one_of_arithmetic() -> None:
    """No torch, and fast: the target is 5 s. The limit is ten times what a slow machine needs."""
    code = (
        "import sys, time; from pathlib import Path; begin = time.process_time()\n"
        "from srlm_mega.gpus import find_gpu\n"
        "from srlm_mega.tools.planner.plan_command import PlanRequest, searched\n"
        "from srlm_mega.tools.planner.training_steps import Lengths\n"
        "preset = Path('launch/configs/llama2_70b_64gpu.yaml')\n"
        "searched(PlanRequest(preset, (), find_gpu('h100'), None, Lengths(), 0.0), False)\n"
        "assert not {'torch', 'scipy', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert time.process_time() - begin < 20"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert COUNTS == (16, 32, 64, 128, 256, 512, 1024)


def test_advice_names_what_dominates() -> None:
    assert set(STEP_ADVICE) == {*TERMS, "pipeline bubble"}
    seconds = dict.fromkeys(STEP_ADVICE, 0.1) | {"bf16 products": 5.0, "TP messages": 2.0}
    text = step_advice(seconds, fp8=True)
    assert "Most of a step is bf16 products (63%)" in text and "Most of what is no work is TP messages (25%)" in text
    assert "no work" not in step_advice(dict.fromkeys(STEP_ADVICE, 0.01) | {"attention": 9.0}, fp8=True)
    kinds = {stage.name.rpartition("/")[2] for stage in stages_of(request().config)}
    assert {"prompts", "candidates", "judgements", "evaluation", "reference"} == set(RUN_ADVICE) & kinds
    times = make_plan(request()).times
    assert {kind_of(time) for time in times} <= set(RUN_ADVICE)
    assert {kind_of(time) for time in times if time.name in ("seed", "round_1/pairs")} == {"work without a GPU"}


def test_fp8_is_neither_planned_nor_advised_where_a_gpu_has_none() -> None:
    for override in ("trainer.fp8=hybrid", "sampler.quantization=fp8"):
        asked = replace(request("llama2_7b_8gpu.yaml", override), gpu=find_gpu("a100"))
        with pytest.raises(UserError, match="a100 has no FP8 units"):
            make_plan(asked)
        assert make_plan(replace(asked, gpu=find_gpu("h100"))).times
    asked = request("llama2_7b_8gpu.yaml")
    assert "or FP8 (" in planned(asked, json=False, figure=None)
    assert "or FP8 (" not in planned(replace(asked, gpu=find_gpu("a100")), json=False, figure=None)


def test_a_sampler_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    """70B in 16 bits: 137.95e9 bytes. 4,096 tokens of 2 * 80 * 1024 * 2 bytes are 1.25 GiB, in FP8 half of it."""
    with pytest.raises(UserError, match=r"weights 128\.5 GiB, .* 4096 tokens 1\.25 GiB; a replica has 1 x 79\.6 GiB"):
        make_plan(request("llama2_70b_64gpu.yaml", "sampler.tp_size=1"))
    one = make_plan(request("llama2_70b_64gpu.yaml", "sampler.tp_size=1", "sampler.quantization=fp8"))
    assert {time.what for time in one.times if time.name.endswith("sampler_weights")} == {"calibration, conversion"}
    assert replica_of(request("llama2_70b_64gpu.yaml", "sampler.quantization=fp8").config, one.cluster).fp8_cache
    assert not replica_of(request().config, one.cluster).fp8_cache


@pytest.mark.parametrize(("gib", "fits"), [(2.5, True), (2.3, False)])
def test_calibration_needs_one_layer_and_one_prompt(gib: float, fits: bool) -> None:
    """70B: a layer of 855.7e6 parameters is 1.59 GiB; 2,048 tokens of 8 * 8192 + 4 * 8192 + 2 * 57344 numbers 0.81."""
    config, gpu = request().config, replace(find_gpu("h100"), memory_gib=gib / 0.95)
    if fits:
        require_calibration_fits(config, gpu)
    else:
        with pytest.raises(UserError, match=r"one layer 1\.6 GiB, its results for a prompt of 2048 tokens 0\.8 GiB; a"):
            require_calibration_fits(config, gpu)


def test_the_command(srlm: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([srlm, "plan", *arguments], capture_output=True, text=True, check=False)

    config = str(CONFIGS / "llama2_7b_8gpu.yaml")
    text = run(config, "--price", "2.5", "--figure", str(tmp_path / "plan.svg"))
    assert text.returncode == 0, text.stderr
    assert "8 x h100, TP 2 DP 4, bf16" in text.stdout and "at 2.5 per GPU-hour" in text.stdout
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    plan = orjson.loads(run(config, "dpo.epochs=2", "--gpu", "h200", "--json").stdout)
    assert plan["gpu"] == "h200" and plan["fits"] == "fits" and plan["step"]["total"] > 0
    assert plan["memory"][0]["total"] == pytest.approx(sum(plan["memory"][0][part] for part in MEMORY_PARTS))
    assert all([*stage] == ["name", "what", "gpus", "seconds", "tokens_per_second"] for stage in plan["stages"])
    nothing = run()
    assert nothing.returncode == 2 and "needs a CONFIG" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CONFIG", "--search", "--figure", "x.svg"), "--search does not go together with --figure"),
        (("CONFIG", "--search", "--price", "2"), "--search does not go together with --price"),
        (("CONFIG", "--points", "p.json", "--search"), "--points does not go together with CONFIG, --search"),
        (("--points", "p.json", "--gpus", "8"), "--points does not go together with --gpus"),
        (("CONFIG", "--figure", "x.xyz"), "--figure x.xyz: Format 'xyz' is not supported"),
        (("CONFIG", "--figure", "no_such_folder/x.svg"), "--figure no_such_folder/x.svg: .*No such file or directory"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(arguments: tuple[str, ...], message: str) -> None:
    config = str(CONFIGS / "llama2_7b_8gpu.yaml")
    result = CliRunner().invoke(app, ["plan", *(config if word == "CONFIG" else word for word in arguments)])
    assert isinstance(result.exception, UserError) and re.search(message, str(result.exception)), result.output


def test_numbers_of_gpus_that_hardly_divide_say_so() -> None:
    few = request("llama2_7b_8gpu.yaml", "sampler.tp_size=4", gpus=2)
    assert "a replica of the sampler takes 4 GPUs" in searched(few, json=False) and searched(few, json=True) == "[]"
    with pytest.raises(UserError, match=r"--gpus 2: a replica of the sampler takes 4 GPUs"):
        make_plan(few)
    assert "Of 7 GPUs TP * PP * CP can be 1." in searched(request(gpus=7), json=False)
    assert "Of 6 GPUs TP * PP * CP can be 1, 2." in searched(request(gpus=6), json=False)


def test_points_in_and_predictions_out(tmp_path: Path) -> None:
    rows = orjson.loads(predictions(CALIBRATION_FILE, json=True))
    assert [row["id"] for row in rows] == [row["id"] for row in orjson.loads(CALIBRATION_FILE.read_bytes())]
    by_id = {row["id"]: row for row in rows}
    row = by_id["L31-405B-fp8-1024-dgxc2504"]
    assert row["tokens_per_sec_per_gpu"] * row["step_time_s"] * 1024 == pytest.approx(512 * 8192)
    assert {row["fits"] for row in rows} == {"fits", "tight"}, "all of them ran"
    (tmp_path / "points.json").write_bytes(orjson.dumps([{"id": "x", "model": "grok", "gpu": "h100", "seq_length": 1}]))
    (bad,) = orjson.loads(predictions(tmp_path / "points.json", json=True))
    assert bad["id"] == "x" and "unknown model" in bad["error"] and bad["tokens_per_sec_per_gpu"] is bad["fits"] is None
    assert "not predicted" in predictions(tmp_path / "points.json", json=False)


def test_every_output_has_the_three_answers(tmp_path: Path) -> None:
    """70B on 64 H100s needs 55.9 GiB without its margin. A point that does not say what it recomputes is taken to have
    fitted; with `recompute` given it is planned as it is."""
    words = {0.17: ("fits", ": fits ("), 0.6: ("tight", ": TIGHT, it fits only without the margin (")}
    for margin, (answer, text) in words.items():
        asked = replace(request(), margin=margin)
        assert orjson.loads(planned(asked, json=True, figure=None))["fits"] == answer
        assert text in planned(asked, json=False, figure=None)
    small = replace(request(), gpu=find_gpu("a100-40gb"))
    assert ": DOES NOT FIT (" in planned(small, json=False, figure=None)
    assert orjson.loads(planned(small, json=True, figure=None))["fits"] == "does not fit"
    point = {"model": "llama3-70b", "n_gpus": 64, "tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2,
             "virtual_pipeline": 1, "global_batch_size": 96, "seq_length": 4096, "recompute": "none"}  # fmt: skip
    (tmp_path / "points.json").write_bytes(orjson.dumps([point | {"micro_batch_size": rows} for rows in (8, 3, 1)]))
    answers = ["does not fit", "tight", "fits"]
    assert [row["fits"] for row in orjson.loads(predictions(tmp_path / "points.json", json=True))] == answers
    printed = predictions(tmp_path / "points.json", json=False).splitlines()[1:]
    assert [answer in line for answer, line in zip(answers, printed, strict=True)] == [True] * 3
    relaxed = CliRunner().invoke(app, ["plan", "--points", str(tmp_path / "points.json"), "--margin", "0.02", "--json"])
    assert [row["fits"] for row in orjson.loads(relaxed.stdout)] == ["does not fit", "fits", "fits"]
    (default,) = {inspect.signature(each).parameters["margin"].default for each in (plan_cli, predictions, search)}
    assert default == request().margin


def test_transformer_engines_layers_are_nvidias_kernels() -> None:
    plans = [make_plan(request("llama2_70b_64gpu.yaml", f"model.layer_backend={name}")) for name in ("auto", ENGINE)]
    assert [plan.job.stack.tuned for plan in plans] == [False, True]
    assert plans[0].step.seconds["slower kernels"] > 0 == plans[1].step.seconds["slower kernels"]


def test_the_search_shows_tight_layouts_marked() -> None:
    """Those that the margin alone forbids; a smaller margin makes them fit."""
    asked = request(gpus=64)
    found = orjson.loads(searched(asked, json=True))
    tight = [each for each in found if each["fits"] == "tight"]
    assert tight and all(each["memory_gib"] > find_gpu("h100").memory_gib for each in tight)
    text = searched(asked, json=False)
    assert re.search(r"DP 4 +auto +none +[\d.]+ +tight", text) and f"{len(tight)} are tight" in text
    relaxed = orjson.loads(searched(replace(asked, margin=0.0), json=True))
    assert sum(each["fits"] == "fits" for each in relaxed) > len(found) - len(tight)


def test_messages_by_hand() -> None:
    """TP 8 of 64 GPUs stays on a node, PP 4 and DP 2 do not. DP alone: (4 + 2) bytes of each of a stage's parameters,
    half of it, over one card of 50 GB/s."""
    plan = make_plan(request("llama2_70b_64gpu.yaml", *SMALLER))
    tp, pp, dp = messages(plan.job, plan.step)
    assert [(each.axis, each.link) for each in (tp, pp, dp)] == [
        ("TP", "NVLink"), ("PP", "network"), ("DP", "network"),
    ]  # fmt: skip
    parameters = (20 * 855_638_016 + 32000 * 8192) / 8
    assert dp.alone == pytest.approx(parameters * 6 / 2 / 50e9)
    assert 0 < dp.exposed < dp.alone and tp.exposed == plan.step.seconds["TP messages"]


def test_tables_for_every_preset() -> None:
    for preset in sorted(CONFIGS.glob("llama*.yaml")):
        overrides = ("model.path=null",) if load_config(preset).model.path is None else ()
        text = planned(request(preset.name, *overrides), json=False, figure=None)
        assert re.search(r"The run: [\d.]+ hours, [\d,]+ GPU-hours", text), preset
        assert "Planned, not measured" in text
    assert "No layout fits" in searched(request(gpus=1), json=False)
    assert orjson.loads(searched(request(gpus=64), json=True))[0]["gpus"] == 64


def test_a_plan_of_cpus_says_what_it_assumes() -> None:
    assert "Assumed in their place: 2 x h100" in planned(request("toy_cpu.yaml"), json=False, figure=None)
    assert orjson.loads(planned(request("toy_cpu.yaml"), json=True, figure=None))["configured_for"] == "cpu"
    assert "Assumed in their place" not in planned(request(), json=False, figure=None)


def test_a_gpu_of_a_file(tmp_path: Path) -> None:
    """H100's own figures, in a file, give H100's own plan."""
    h100, path = find_gpu("h100"), tmp_path / "card.yaml"
    given = {
        "name": "ours", "bf16_tflops": 989.4, "fp8_tflops": 1978.9, "memory_tbps": 3.35, "memory_gib": 79.6,
        "nvlink_gbps": 450, "network_gbps": 50,
    }  # fmt: skip
    path.write_text(orjson.dumps(given).decode())
    gpu = chosen_gpu(None, path)
    assert replace(gpu, name="h100", words=h100.words) == h100
    assert make_plan(replace(request(), gpu=gpu)).hours == make_plan(request()).hours
    with pytest.raises(UserError, match="give one of them"):
        chosen_gpu("h100", path)
    with pytest.raises(UserError, match="No such file"):
        chosen_gpu(None, tmp_path / "none.yaml")
    wrong = ({"memory_gib": -1}, {"memory_gib": "many"}, {"memory_gib": float("inf")}, {"cores": 8}, {"name": None})
    for text in ("[]", "a: [", "", *(yaml.safe_dump(given | change) for change in wrong)):
        path.write_text(text)
        with pytest.raises(UserError, match=r"card\.yaml (does not describe a GPU: .*its keys are name|is not YAML)"):
            chosen_gpu(None, path)
