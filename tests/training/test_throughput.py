"""FLOP, rates and MFU with numbers worked out by hand, and one published model."""

import pytest

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.model_sizes import attention_flops, linear_flops_per_token, sizes_of, train_flops
from srlm_mega.config.training import TrainerConfig
from srlm_mega.gpus import peak_tflops
from srlm_mega.training.throughput import Meter

TINY = LlamaShape(
    num_layers=1,
    hidden_size=2,
    ffn_hidden_size=3,
    num_attention_heads=1,
    num_query_groups=1,
    vocab_size=5,
    max_position_embeddings=8,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
LLAMA_3_70B = sizes_of(LlamaShape(80, 8192, 28672, 64, 8, 128256, 8192, 1e-5, 5e5))


def test_matrices_by_hand() -> None:
    """Weights: q, k, v, o 4 * 2 * 2 = 16; gate, up, down 3 * 2 * 3 = 18; output 2 * 5 = 10. 6 * 44 = 264."""
    assert linear_flops_per_token(sizes_of(TINY)) == 264


def test_attention_by_hand() -> None:
    """Lengths 2 and 3: 6 * 2 * (4 + 9) = 156. As one sequence of 5 it would be 6 * 2 * 25 = 300."""
    assert attention_flops(sizes_of(TINY), [2, 3]) == 156
    assert attention_flops(sizes_of(TINY), [5]) == 300
    assert attention_flops(sizes_of(TINY), [2, 3], convention=2.0) == 312
    assert train_flops(sizes_of(TINY), [2, 3]) == 5 * 264 + 156


@pytest.mark.parametrize(("convention", "gflop"), [(1.0, 449), (2.0, 481)])
def test_llama_3_70b_at_8k(convention: float, gflop: float) -> None:
    """The two figures in print for one token."""
    per_token = linear_flops_per_token(LLAMA_3_70B) + attention_flops(LLAMA_3_70B, [8192], convention) / 8192
    assert per_token / 1e9 == pytest.approx(gflop, abs=0.5)


def test_meter_by_hand() -> None:
    """Sequences of 3 and 4 tokens have 2 and 3 inputs in 8 positions: 1476 FLOP in 0.5 s on 2 devices."""
    metrics = Meter(TINY, world_size=2, peak_tflops=1e-8).measure([3, 4], num_positions=8, seconds=0.5)
    assert metrics == {
        "tokens/s/GPU": pytest.approx(8.0),
        "useful_tokens/s/GPU": pytest.approx(5.0),
        "TFLOP/s/GPU_causal": pytest.approx(1476e-12),
        "MFU_causal": pytest.approx(0.1476),
    }


def test_padding_is_no_work() -> None:
    """More positions raise tokens/s and nothing else: MFU cannot be bought with padding."""
    meter = Meter(TINY, world_size=1, peak_tflops=1.0)
    tight, padded = meter.measure([3, 4], 5, 1.0), meter.measure([3, 4], 50, 1.0)
    assert padded["tokens/s/GPU"] == 10 * tight["tokens/s/GPU"]
    assert all(padded[key] == tight[key] for key in ("useful_tokens/s/GPU", "TFLOP/s/GPU_causal", "MFU_causal"))


def test_precision_is_that_of_the_matrix_products() -> None:
    assert TrainerConfig().precision == "fp32"
    assert TrainerConfig(bf16=True).precision == "bf16"
    assert TrainerConfig(bf16=True, fp8="hybrid").precision == "fp8"


def test_no_mfu_for_what_is_not_known() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp8") == 1978.9
    for name, precision in (
        (None, "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("NVIDIA H200", "fp32"),
    ):
        assert peak_tflops(name, precision) is None  # type: ignore[arg-type]
    assert "MFU_causal" not in Meter(TINY, 1, None).measure([3], 2, 1.0)
