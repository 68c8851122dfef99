"""What `srlm doctor CONFIG` says of the packages that training would use."""

import pytest
import torch
from test_backend import ALL, CONFIG_OF_GPUS, with_packages

from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.training.optional_packages import training_parts


@pytest.mark.parametrize(
    ("packages", "override", "engine", "flash", "apex"),
    [
        (ALL, "model.layer_backend=auto", "layers, attention", "Transformer Engine chooses", "does it"),
        (ALL, "model.layer_backend=torch", "model.layer_backend=torch", "attention", "gradients of weights"),
        (ALL, "trainer.device=cpu", "on the CPU", "on the CPU", "on the CPU"),
        (set(), "model.layer_backend=auto", "plain PyTorch", "torch_varlen", "Adam is torch's"),
        ({"flash_attn"}, "trainer.bf16=false", "not installed: layers", "trainer.bf16=false", "not installed"),
    ],
)
def test_each_part_has_its_use_or_the_reason(
    packages: set[str], override: str, engine: str, flash: str, apex: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(monkeypatch, *packages)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = {part.name: part for part in training_parts(load_config(CONFIG_OF_GPUS, [override]))}
    wanted = {"transformer-engine": engine, "flash-attn": flash, "apex": apex}
    assert {name: word in rows[name].why for name, word in wanted.items()} == dict.fromkeys(wanted, True), rows
    used = {name for name, row in rows.items() if row.use == "used"}
    match override:
        case "model.layer_backend=auto" if packages:
            assert used == {"transformer-engine", "flash-attn"}
        case "model.layer_backend=torch":
            assert used == {"flash-attn", "apex"}
        case _:
            assert used == set()


def test_what_training_would_refuse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no CUDA device here"):
        training_parts(load_config(CONFIG_OF_GPUS))
    with_packages(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"trainer\.fp8=hybrid: Transformer Engine layers need"):
        training_parts(load_config(CONFIG_OF_GPUS, ["trainer.fp8=hybrid"]))
