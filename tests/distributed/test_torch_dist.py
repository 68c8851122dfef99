"""megatron-core reads what the converter writes, in other layouts than it was written for, and the other way round."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from model_weights import weights_of
from small_run import NUM_LAYERS, VOCAB_SIZE

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.huggingface import write_folder
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.verify import prove

pytestmark = [pytest.mark.slow, pytest.mark.extra]


def test_megatron_and_the_converter_read_one_another(tmp_path: Path, launch: Callable[..., str]) -> None:
    for case in ("tied", "untied"):
        shape = LlamaShape(NUM_LAYERS, 32, 48, 4, 2, VOCAB_SIZE, 64, 1e-5, 10000.0, case == "tied")
        model = tmp_path / case / "model"
        write_folder(model, shape, weights_of(shape), tokenizer_from=None)
        convert(model, tmp_path / case / "checkpoint", Wish(Kind.MEGATRON, tp=2, pp=2), Resources(), no_bar)
    launch(2, Path(__file__).parent / "torch_dist_worker.py", tmp_path)
    for case, tensors in (("tied", 9 * NUM_LAYERS + 2), ("untied", 9 * NUM_LAYERS + 3)):
        for name in ("tp2", "pp2", "dp2"):
            shutil.copyfile(tmp_path / case / "model/config.json", tmp_path / case / name / "config.json")
            proof = prove(tmp_path / case / "model", tmp_path / case / name, no_bar)
            assert (proof.num_tensors, proof.destination_kind) == (tensors, "megatron")
