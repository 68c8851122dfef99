"""Which implementation runs the layers, on machines with and without the packages; FP8's rules."""

from typing import get_args

import pytest
import torch
from places import CONFIGS

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.training import Fp8Recipe, ParallelConfig, TrainerConfig
from srlm_mega.errors import UserError
from srlm_mega.training import backend
from srlm_mega.training.attention_sdpa import SdpaAttention
from srlm_mega.training.backend import check_capability, choose_backend
from srlm_mega.training.fp8_recipe import length_multiple
from srlm_mega.training.layer_torch import FUSED_NORMS, torch_block, unfused_name

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CONFIG_OF_GPUS = CONFIGS / "llama2_7b_8gpu.yaml"
ALL = {"transformer_engine", "flash_attn", "fused_weight_gradient_mlp_cuda"}


def config(*overrides: str) -> Config:
    layout = ("parallel.tensor_model_parallel_size=4", "parallel.data_parallel_size=2")
    return load_config(CONFIG_OF_GPUS, (*layout, *overrides))


def with_packages(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(backend, "installed", lambda package: package in packages)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("packages", "device", "override", "layers", "attention"),
    [
        (ALL, CUDA, "model.layer_backend=auto", "transformer_engine", "transformer_engine"),
        (ALL, CUDA, "model.layer_backend=torch", "torch", "flash_attn"),
        (ALL, CPU, "model.layer_backend=auto", "torch", "sdpa"),
        ({"flash_attn"}, CUDA, "model.layer_backend=auto", "torch", "flash_attn"),
        ({"flash_attn"}, CUDA, "trainer.bf16=false", "torch", "sdpa"),
        (set(), CUDA, "model.layer_backend=auto", "torch", "torch_varlen"),
        (set(), CUDA, "trainer.bf16=false", "torch", "sdpa"),
        (set(), CPU, "model.layer_backend=auto", "torch", "sdpa"),
        ({"flash_attn"}, CUDA, "parallel.context_parallel_size=2", "torch", "sdpa_of_gathered_keys"),
        (ALL, CUDA, "parallel.context_parallel_size=2", "transformer_engine", "transformer_engine"),
    ],
)
def test_choices(
    packages: set[str],
    device: torch.device,
    override: str,
    layers: str,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_packages(monkeypatch, *packages)
    settings = config(
        "parallel.data_parallel_size=null", "sft.packed_sequence_size=null", "dpo.packed_sequence_size=null", override
    )
    chosen = choose_backend(settings, device)
    assert (chosen.layers, chosen.attention) == (layers, attention)
    assert chosen.fuse_weight_gradients == (layers == "torch"), "Transformer Engine's linears do it themselves"
    said = attention + (" (a call per sequence, without cuDNN)" if attention == "sdpa" else "")
    assert str(chosen).startswith(f"layers: {layers}; attention: {said}; fused: ")


def test_devices_before_ampere_have_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, "flash_attn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend(config(), CUDA).attention == "sdpa"


def test_nothing_is_fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, that is: so a run keeps its bytes. In bf16 weight gradients are added without being rounded first."""
    with_packages(monkeypatch, *ALL)
    in_fp32 = choose_backend(config("trainer.bf16=false"), CPU)
    assert not any(on for on in in_fp32.settings().values() if on != "local")
    in_bf16 = choose_backend(config(), CPU).settings()
    assert in_bf16 == in_fp32.settings() | {"gradient_accumulation_fusion": True}


def test_who_adds_weight_gradients_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for packages, said in [(ALL, "weight gradients (apex)"), (set[str](), "weight gradients (torch)")]:
        with_packages(monkeypatch, *packages)
        assert said in str(choose_backend(config("model.layer_backend=torch"), CUDA))
    with_packages(monkeypatch, *ALL)
    assert "weight gradients (Transformer Engine)" in str(choose_backend(config(), CUDA))


@pytest.mark.parametrize(
    ("packages", "device", "override", "said"),
    [
        (set(), CUDA, "model.layer_backend=transformer_engine", r"layer_backend=.*\(it is not installed\)"),
        (ALL, CPU, "model.layer_backend=transformer_engine", r"this is cpu.*\(it is installed\)"),
        (set(), CUDA, "trainer.fp8=hybrid", "trainer.fp8=hybrid: Transformer Engine layers need"),
    ],
)
def test_what_cannot_be_had_is_refused(
    packages: set[str], device: torch.device, override: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(monkeypatch, *packages)
    with pytest.raises(UserError, match=said):
        choose_backend(config(override), device)


def test_fp8_needs_a_device_that_has_it() -> None:
    check_capability((8, 9), "tensorwise")
    with pytest.raises(UserError, match=r"this device has 8\.0"):
        check_capability((8, 0), "tensorwise")


@pytest.mark.parametrize(
    ("recipe", "device", "remedy"),
    [
        ("delayed", (8, 6), "trainer.fp8=null"),
        ("blockwise", (8, 9), "trainer.fp8_recipe=tensorwise"),
        ("mxfp8", (8, 0), "trainer.fp8=null"),
        ("mxfp8", (9, 0), "trainer.fp8_recipe=tensorwise"),
        ("mxfp8", (12, 0), "trainer.fp8_recipe=tensorwise"),
    ],
)
def test_recipes_are_refused_where_transformer_engine_refuses_them(
    recipe: Fp8Recipe, device: tuple[int, int], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message, with the recipe, the device and the way out, as soon as the layers are chosen."""
    with_packages(monkeypatch, *ALL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device)
    with pytest.raises(UserError, match=rf"fp8_recipe={recipe} needs .*has {device[0]}\.{device[1]}: set {remedy}$"):
        choose_backend(config(f"trainer.fp8_recipe={recipe}", "trainer.fp8=e4m3", "model.ffn_hidden_size=16384"), CUDA)


def test_recipes_of_blackwell() -> None:
    """B200 (10.0) and B300 (10.3) take all of them."""
    for recipe in get_args(Fp8Recipe):
        check_capability((10, 0), recipe)
        check_capability((10, 3), recipe)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.fp8=hybrid", "trainer.bf16=false"], "needs trainer.bf16=true"),
        (["trainer.fp8=hybrid", "model.layer_backend=torch"], "needs Transformer Engine on CUDA"),
        (["trainer.fp8=hybrid", "trainer.device=cpu"], "needs Transformer Engine on CUDA"),
        (
            ["trainer.fp8=hybrid", "trainer.fp8_recipe=delayed", "trainer.first_last_layers_bf16=true"],
            "delayed scales all layers",
        ),
        (["trainer.first_last_layers_bf16=true"], "set trainer.fp8 too"),
        (["trainer.fp8_shadow_interval=10"], "set trainer.fp8 too"),
        # 11008 / 4 = 2752 = 21 * 128 + 64
        (["trainer.fp8=hybrid", "trainer.fp8_recipe=blockwise"], "multiples of 128: ffn_hidden_size / TP is 2752"),
        # 11072 / 4 = 2768 = 86 * 32 + 16
        (
            ["trainer.fp8=hybrid", "trainer.fp8_recipe=mxfp8", "model.ffn_hidden_size=11072"],
            "multiples of 32: ffn_hidden_size / TP is 2768",
        ),
        (
            ["trainer.fp8=e4m3", "trainer.fp8_recipe=tensorwise", "trainer.first_last_layers_bf16=true",
             "trainer.num_layers_at_end_in_bf16=33"],
            r"33 layers in bf16 .* 32 layers / PP 1 = 32",
        ),
        (["parallel.overlap_grad_reduce=false"], "needs use_distributed_optimizer and overlap_grad_reduce"),
        (
            ["parallel.context_parallel_size=2", "parallel.data_parallel_size=1"],
            "dpo.packed_sequence_size and context_parallel_size 2 do not go together",
        ),
        (["parallel.context_parallel_size=3"], r"8 is not divisible by TP \* PP \* CP 12"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(*overrides)


def test_settings_that_agree() -> None:
    config("trainer.fp8=hybrid", "trainer.fp8_shadow_interval=10")
    config("trainer.fp8=hybrid", "trainer.fp8_recipe=tensorwise", "trainer.first_last_layers_bf16=true")
    config("trainer.fp8=hybrid", "trainer.fp8_recipe=mxfp8", "trainer.first_last_layers_bf16=true")
    config("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=false")


def test_lengths_that_fp8_takes() -> None:
    """16 positions on each rank, mxfp8 32, blockwise 128; TP splits the sequence only with sequence parallelism."""
    four = ParallelConfig(tensor_model_parallel_size=4)
    assert length_multiple(TrainerConfig(), four) == 1
    assert length_multiple(TrainerConfig(fp8="hybrid"), four) == 16
    assert length_multiple(TrainerConfig(fp8="hybrid"), four.model_copy(update={"sequence_parallel": True})) == 64
    assert length_multiple(TrainerConfig(fp8="hybrid", fp8_recipe="blockwise"), four) == 128
    assert length_multiple(TrainerConfig(fp8="hybrid", fp8_recipe="mxfp8"), four) == 32
    assert length_multiple(TrainerConfig(fp8="e4m3", fp8_recipe="mxfp8"), ParallelConfig(context_parallel_size=2)) == 64


def test_names_of_fused_norms() -> None:
    """Both kinds of layer give the same names to the converter, and to a distributed checkpoint."""
    fused = "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    assert unfused_name(fused) == "decoder.layers.3.input_layernorm.weight"
    fused = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert unfused_name(fused) == "decoder.layers.0.pre_mlp_layernorm.weight"
    for name in ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.0.input_layernorm.weight"):
        assert unfused_name(name) == name
    (layer,) = torch_block(1, SdpaAttention).layer_specs
    assert layer.submodules.sharded_state_dict_keys_map == FUSED_NORMS
    assert all(layer.submodules.__dict__[plain.rstrip(".")] is not None for plain in FUSED_NORMS)
