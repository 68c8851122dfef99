"""The planner's FLOP, quantities and monotonic behaviour."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.model_sizes import attention_flops, flops_per_token, linear_flops_per_token, sizes_of
from srlm_mega.errors import UserError
from srlm_mega.gpus import GPUS, PEAKS_BY_DRIVER_NAME, find_gpu
from srlm_mega.tools.planner.communication import data_parallel_seconds, tensor_parallel_seconds
from srlm_mega.tools.planner.job import MEGATRON, Job, ParallelLayout
from srlm_mega.tools.planner.memory import fullest_stage, stage_memory
from srlm_mega.tools.planner.points import (
    CALIBRATION_FILE,
    TORCHTITAN,
    Point,
    published_flops_per_token,
    read_points,
    stack_of,
)
from srlm_mega.tools.planner.shapes import PUBLISHED, find_shape
from srlm_mega.tools.planner.step_time import (
    FITTED,
    exposed,
    head_quantities,
    layer_quantities,
    stage_parameters,
    step_parts,
    step_quantities,
)
from srlm_mega.tools.planner.training_steps import OURS

LLAMA_70B = PUBLISHED["llama3-70b"]
H100 = find_gpu("h100")


def job(tp: int = 4, pp: int = 4, vpp: int = 1, cp: int = 1, dp: int = 4, micro_batches: int = 8) -> Job:
    layout = ParallelLayout(tp, pp, cp, dp, vpp, sequence_parallel=tp > 1)
    return Job(LLAMA_70B, H100, layout, "bf16", 1, micro_batches * dp, 8192)


def seconds(of: Job) -> float:
    return sum(step_quantities(of).times(FITTED).values)


def test_llama_3_70b_at_8k_by_hand() -> None:
    """A layer: 2 * 8192^2 * (1 + 8/64) + 3 * 8192 * 28672 = 855,638,016; 80 of them; the head 8192 * 128256; attention
    80 * 8192 * 8192: all times 6. The figures everyone quotes: 481 with full attention, 449 causal GFLOP."""
    matrices = 80 * 855_638_016 + 8192 * 128_256
    assert LLAMA_70B.layer_parameters == 855_638_016
    assert flops_per_token(LLAMA_70B, 8192) == 6 * (matrices + 80 * 8192 * 8192)
    assert round(flops_per_token(LLAMA_70B, 8192) / 1e9) == 449
    assert round(flops_per_token(LLAMA_70B, 8192, 2.0) / 1e9) == 481


def test_the_trainer_counts_the_same_flop() -> None:
    llama = sizes_of(LlamaShape(80, 8192, 28672, 64, 8, 128256, 8192, 1e-5, 5e5))
    trainer = linear_flops_per_token(llama) + attention_flops(llama, [8192]) / 8192
    assert flops_per_token(LLAMA_70B, 8192) == pytest.approx(trainer, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "seq_length", "convention", "tokens", "tflops"),
    [
        ("llama2-7b", 4096, "full-attention", 16934, 780),
        ("llama3-8b", 8192, "full-attention", 12273, 711),
        ("llama3-8b", 8192, "causal(half)", 14451, 744),
        ("llama3-405b", 8192, "causal(half)", 292, 737),
    ],
)
def test_published_tokens_and_tflops_belong_together(
    model: str, seq_length: int, convention: str, tokens: int, tflops: int
) -> None:
    """Three digits are published: the convention is right when the product rounds to them, and another is not."""
    shape = find_shape(model)
    assert round(tokens * published_flops_per_token(shape, seq_length, convention) / 1e12) == tflops
    other = "causal" if convention.startswith("full") else "full"
    other = {"causal": "causal", "full": "full-attention"}[other]
    assert round(tokens * published_flops_per_token(shape, seq_length, other) / 1e12) != tflops


@pytest.mark.parametrize(
    ("model", "seq_length", "gflop_full", "gflop_causal", "gflop_linear"),
    [("llama2-7b", 4096, 46.08, 42.86, 39.64), ("llama3-8b", 8192, 57.91, 51.47, 45.03)],
)
def test_conventions_to_four_digits(
    model: str, seq_length: int, gflop_full: float, gflop_causal: float, gflop_linear: float
) -> None:
    """7B: layer 4 * 4096^2 + 3 * 4096 * 11008 = 202,375,168; 6 * (32 * that + 4096 * 32000) = 39.64e9; attention
    6 * 32 * 4096 * 4096 = 3.221e9 once or twice. 8B: layer 218,103,808, head 525,336,576, attention 6.442e9."""
    shape = find_shape(model)
    for a, expected in ((2.0, gflop_full), (1.0, gflop_causal), (0.0, gflop_linear)):
        assert round(flops_per_token(shape, seq_length, a) / 1e9, 2) == expected


def test_frozen_weights_have_two_thirds_of_the_flop() -> None:
    shape = find_shape("llama2-70b")
    whole, frozen = (published_flops_per_token(shape, 4096, words) for words in ("linear-only", "linear-only x 2/3"))
    assert frozen == pytest.approx(whole * 2 / 3)
    with pytest.raises(ValueError, match="does not begin with"):
        published_flops_per_token(shape, 4096, "someone's own")


def test_products_of_a_layer_by_hand() -> None:
    """One GPU, 8192 tokens: 6 * 855,638,016 * 8192 FLOP at 989.4 TFLOP/s. FP8: at 1978.9."""
    single = job(tp=1, pp=1, dp=1)
    assert layer_quantities(single).matrices_bf16 == pytest.approx(6 * 855_638_016 * 8192 / 989.4e12)
    fp8 = layer_quantities(replace(single, precision="fp8"))
    assert (fp8.matrices_bf16, fp8.matrices_fp8) == (0.0, pytest.approx(6 * 855_638_016 * 8192 / 1978.9e12))
    frozen = layer_quantities(replace(single, frozen=True))
    assert frozen.matrices_bf16 == pytest.approx(4 * 855_638_016 * 8192 / 989.4e12)


def test_recompute_repeats_the_forward_pass() -> None:
    single = replace(job(tp=1, pp=1, dp=1), stack=replace(MEGATRON, tuned=True))
    again = layer_quantities(replace(single, recompute="full"))
    assert again.matrices_bf16 == pytest.approx(layer_quantities(single).matrices_bf16 * 4 / 3)
    plain, selective = layer_quantities(single), layer_quantities(replace(single, recompute="selective"))
    assert selective == replace(plain, attention=plain.attention * 4.5 / 3.5), "Megatron's repeats attention alone"
    assert again.attention == selective.attention
    ours = replace(single, stack=OURS)
    assert layer_quantities(replace(ours, recompute="selective")) == layer_quantities(ours), "norms are next to nothing"


def test_attention_of_torchs_ring_is_a_quantity_of_its_own() -> None:
    """Three of four blocks came around the ring; Megatron's context parallelism hides its transfers."""
    whole = replace(job(tp=1, pp=1, cp=4), stack=TORCHTITAN)
    ring = layer_quantities(whole)
    flops = 2 * 2048 * 8192 * 8192 * 3.5 / 989.4e12
    assert (ring.attention, ring.attention_flash2) == (0, pytest.approx(flops / 4))
    assert ring.attention_ring == pytest.approx(flops * 3 / 4)
    megatron = layer_quantities(replace(whole, stack=MEGATRON))
    assert (megatron.attention, megatron.attention_ring) == (pytest.approx(flops), 0)
    assert layer_quantities(replace(job(tp=1, pp=1), stack=TORCHTITAN)).attention_ring == 0
    assert FITTED.attention_ring > 1.3 * FITTED.attention_flash2


def test_what_software_loses_that_is_not_of_2025() -> None:
    """A share of a layer's work, as it was expected to take: products, attention, passes."""
    layer = layer_quantities(job(tp=1, pp=1))
    work = 1.4 * layer.matrices_bf16 + 2.0 * layer.attention + 1.3 * layer.passes
    assert layer.untuned == pytest.approx(work)
    tuned = layer_quantities(replace(job(tp=1, pp=1), stack=replace(MEGATRON, tuned=True)))
    assert tuned == replace(layer, untuned=0.0)


def test_a_fused_loss_has_no_copies_in_fp32() -> None:
    """52 bytes a logit, or 10; ours has 14."""
    plain, fused = (replace(job(tp=1, pp=1), stack=replace(MEGATRON, fused_loss=fused)) for fused in (False, True))
    logits = 8192 * 128_256 / 3.35e12
    assert head_quantities(plain).passes == pytest.approx(52 * logits)
    assert head_quantities(fused).passes == pytest.approx(10 * logits)
    assert head_quantities(replace(fused, fused_head=True)).passes == pytest.approx(14 * logits)


def test_adapters_pass_over_inputs_and_results() -> None:
    """Inputs of a layer's matrices 8192 + 8192 + 8192 + 28672 columns, results 10240 + 8192 + 57344 + 8192."""
    whole, frozen = (layer_quantities(replace(job(tp=1, pp=1), frozen=frozen)) for frozen in (False, True))
    size = 2 * 8192 * (3 * 53_248 + 5 * 83_968)
    assert frozen.passes - whole.passes == pytest.approx(size / 3.35e12)


@pytest.mark.parametrize(
    ("name", "source", "tuned", "fused_loss", "flash2"),
    [
        ("Megatron-Core/NeMo", "NVIDIA/NeMo:performance.md (NeMo 24.03.01)", False, False, True),
        ("Megatron-Core/NeMo", "NVIDIA/NeMo:performance.md (NeMo 24.07, DGX-H100)", False, False, False),
        ("Megatron-Core/NeMo", "NVIDIA/Megatron-LM:README", False, False, False),
        ("Megatron-Core/NeMo", "NVIDIA/dgxc-benchmarking@741c886 (v25.04): llama3.1/README.md", True, False, False),
        ("Megatron-Core/NeMo", "NVIDIA-NeMo/Megatron-Bridge:summary.md (26.04.01, DGX-H100)", True, True, False),
        ("torchtitan", "pytorch/torchtitan:llama3_h100_202412_torchtitan.md", False, False, True),
        ("torchtitan", "pytorch/torchtitan:llama3-8b_h200_202506.md", False, True, True),
        ("PyTorch FSDP (llm-foundry)", "", False, True, True),
        ("MaxText (JAX)", "", False, False, False),
    ],
)
def test_releases_of_frameworks(name: str, source: str, tuned: bool, fused_loss: bool, flash2: bool) -> None:
    stack = stack_of(name, source)
    assert (stack.tuned, stack.fused_loss, stack.flash2) == (tuned, fused_loss, flash2)
    assert stack.ring_in_blocks == (name == "torchtitan")
    assert stack.gradient_bytes == (2 if "Bridge" in source else 4)


def test_the_bubble_by_hand() -> None:
    """(pp - 1) / vpp micro batches of waiting: 3 of 4 stages, 8 micro batches; with 5 chunks a fifth."""
    plain = step_parts(job())
    assert plain.bubble.matrices_bf16 == pytest.approx(3 * 20 * layer_quantities(job()).matrices_bf16)
    assert step_parts(job(vpp=5)).bubble.matrices_bf16 == pytest.approx(plain.bubble.matrices_bf16 / 5)
    assert step_parts(job(pp=1)).bubble.matrices_bf16 == 0


def test_messages_by_hand() -> None:
    """TP 8: ten messages of 8192 * 8192 * 2 bytes per layer, 7/8 of each, at 450 GB/s. DP 16 of 8 per node: 4 + 2 bytes
    per parameter, 15/16 of it, at 8 cards of 50 GB/s; with TP 8 at one card."""
    assert tensor_parallel_seconds(job(tp=8), 1) == pytest.approx(10 * 8192 * 8192 * 2 * 7 / 8 / 450e9)
    assert data_parallel_seconds(job(tp=1, dp=16), 1e9) == pytest.approx(6e9 * 15 / 16 / 400e9)
    assert data_parallel_seconds(job(tp=8, dp=16), 1e9) == pytest.approx(6e9 * 15 / 16 / 50e9)
    assert data_parallel_seconds(job(tp=8, dp=1), 1e9) == 0
    assert exposed(1.0, 0.0) == 1.0 and exposed(1.0, 5.0) == pytest.approx(0.2)


def test_gradients_hide_behind_the_backward_pass_and_weights_behind_the_forward_one() -> None:
    """Each with its own switch; 4 of 6 bytes are gradients. Without the distributed optimizer nothing is gathered, and
    gradients move twice. Every stage overlaps: the one that counts has the head, and is the last."""

    def once(**change: bool) -> float:
        base = job(tp=8, dp=16)
        return step_parts(replace(base, layout=replace(base.layout, **change))).once.data_parallel

    parameters = stage_parameters(job(tp=8, dp=16))
    sums, gathers = (parameters * size * 15 / 16 / 50e9 for size in (4, 2))
    neither = once(overlap_grad_reduce=False, overlap_param_gather=False)
    assert neither == pytest.approx(sums + gathers)
    assert 0.2 * gathers <= once(overlap_grad_reduce=False) - sums < gathers
    assert 0.2 * sums <= once(overlap_param_gather=False) - gathers < sums
    assert once() < min(once(overlap_grad_reduce=False), once(overlap_param_gather=False))
    assert once(distributed_optimizer=False, overlap_grad_reduce=False) == pytest.approx(2 * sums)


LAYOUTS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4, 8]),
        "pp": st.sampled_from([1, 2, 4, 8, 16]),
        "cp": st.sampled_from([1, 2, 4]),
        "dp": st.sampled_from([1, 2, 8, 64]),
        "micro_batches": st.integers(1, 64),
    }
)


@given(LAYOUTS)
def test_more_of_an_axis_never_needs_more_of_what_it_shares(sizes: dict[str, int]) -> None:
    base = job(**sizes)

    def with_layout(**change: int) -> Job:
        return replace(base, layout=replace(base.layout, **change), global_batch=base.global_batch)

    wide = with_layout(tp=2 * base.layout.tp)
    assert fullest_stage(wide).weights < fullest_stage(base).weights
    deep = with_layout(pp=2 * base.layout.pp) if base.layout.pp < 16 else base
    assert fullest_stage(deep).weights <= fullest_stage(base).weights
    replicas = replace(with_layout(dp=2 * base.layout.dp), global_batch=2 * base.global_batch)
    assert fullest_stage(replicas).optimizer < fullest_stage(base).optimizer
    assert fullest_stage(replicas).activations == fullest_stage(base).activations
    longer = replace(base, seq_length=2 * base.seq_length)
    assert fullest_stage(longer).total > fullest_stage(base).total
    assert fullest_stage(replace(base, recompute="full")).activations < fullest_stage(base).activations


@given(LAYOUTS, st.integers(1, 64))
def test_more_micro_batches_never_make_the_bubble_larger(sizes: dict[str, int], more: int) -> None:
    def share(micro_batches: int) -> float:
        parts = step_parts(job(**{**sizes, "micro_batches": micro_batches}))
        return sum(parts.bubble.times(FITTED).values) / sum(parts.total.times(FITTED).values)

    assert share(sizes["micro_batches"] + more) <= share(sizes["micro_batches"]) + 1e-12


@given(LAYOUTS)
def test_time_grows_with_work_and_shrinks_with_better_parts(sizes: dict[str, int]) -> None:
    base = job(**sizes)
    assert seconds(replace(base, seq_length=2 * base.seq_length)) > seconds(base)
    assert seconds(replace(base, global_batch=2 * base.global_batch)) > seconds(base)
    assert seconds(replace(base, recompute="full")) > seconds(base)
    many = replace(base, global_batch=64 * base.global_batch)  # FP8 casts the weights once a step
    assert seconds(replace(many, precision="fp8")) < seconds(many)
    faster = replace(H100, peak=replace(H100.peak, bf16=2 * H100.peak.bf16), memory_tbps=2 * H100.memory_tbps)
    assert seconds(replace(base, gpu=faster)) < seconds(base)
    assert seconds(replace(base, gpu=replace(H100, network_gbps=100))) <= seconds(base)


def test_outside_the_calibrated_range_nothing_breaks() -> None:
    """Speed falls, never rises, with length; MFU stays between 0 and 1."""
    speeds = []
    for length in (512, 8192, 131_072, 2**22):
        each = replace(job(), seq_length=length)
        speeds.append(each.tokens_per_step / seconds(each))
        share = flops_per_token(LLAMA_70B, length) * speeds[-1] / (989.4e12 * each.layout.gpus)
        assert 0 < share < 1
    assert speeds[1:] == sorted(speeds[1:], reverse=True)
    order = [seconds(replace(job(), gpu=find_gpu(name))) for name in ("a100", "h100", "h200", "b200")]
    assert order == sorted(order, reverse=True)


def test_every_calibration_point_is_understood() -> None:
    points = read_points(CALIBRATION_FILE)
    assert len(points) == 68 and all(isinstance(point, Point) for point in points)


def test_names_of_gpus_and_models() -> None:
    assert find_gpu("H100-SXM-80GB").name == "h100" and find_gpu("NVIDIA A100-SXM4-80GB").name == "a100"
    assert find_gpu("H100-96GB-HBM2e-500W").name == "h100-500w" and find_gpu("GB200-NVL72").name == "gb200"
    assert all(find_gpu(gpu.name) is gpu for gpu in GPUS)
    with pytest.raises(UserError, match="unknown GPU 'tpu-v5': give one of a100"):
        find_gpu("tpu-v5")
    assert find_gpu("H100 80GB").name == find_gpu("NVIDIA H100 80GB HBM3").name == "h100"
    assert find_gpu("H100-PCIe").name == find_gpu("NVIDIA H100 PCIe 80GB").name == "h100-pcie"
    for other in ("A100-40GB", "A100 SXM4 40GB", "a100-40", "A100-40G"):
        assert find_gpu(other).name == "a100-40gb"
    assert find_gpu("A100-PCIe-80GB").name == "a100-pcie" and find_gpu("NVIDIA H200 NVL 141GB").name == "h200-nvl"
    for name, peak in PEAKS_BY_DRIVER_NAME.items():
        assert find_gpu(name).peak == peak
    for other in (
        "H1000", "H100-96GB", "a100-banana", "a100-8", "8xh100", "h100-h200", "h100-nvl72", "h100-pcie-sxm", "l40s-sxm",
        "h200-80gb", "gh200-80gb", "80gb", "banana", "", "-", "NVIDIA",
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"unknown GPU '{other}'"):
            find_gpu(other)
    for name in ("llama3.1-70b", "llama33-70b", "Llama-3-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct",
                 "meta-llama/Meta-Llama-3-70B"):  # fmt: skip
        assert find_shape(name) == LLAMA_70B
    assert find_shape("nemotron4-15b") == find_shape("nemotron-15b") and find_shape("GPT-3 175B").num_layers == 96
    spelled = find_shape("gpt h=2048 L=24 heads=16 MHA ffn=4h vocab=131072")
    assert round(spelled.parameters / 1e9, 1) == 1.7  # as it is called
    with pytest.raises(UserError, match="unknown model 'mixtral-8x7b'"):
        find_shape("mixtral-8x7b")


def test_stages_that_do_not_divide_count_embedding_and_head() -> None:
    """405B: 126 layers and two ends over 8 stages: 15, 16, ..., 15."""
    parts = stage_memory(replace(job(tp=8, pp=8), shape=PUBLISHED["llama3-405b"]))
    assert parts[0].parameters < parts[1].parameters == parts[6].parameters
