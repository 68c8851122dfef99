"""What is written without torch is what torch reads, and Megatron-LM's `--load` finds it."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama_folders import save_model
from test_convert import GQA, model, there
from torch.distributed import checkpoint

from srlm_mega.checkpoints_conversion.convert import Kind, recognise
from srlm_mega.checkpoints_conversion.huggingface import open_weights
from srlm_mega.checkpoints_conversion.model_place import located
from srlm_mega.checkpoints_conversion.torch_dist import COMMON_STATE, global_tensors
from srlm_mega.checkpoints_conversion.torch_save import Call, Global, SavedFile, pickled


@pytest.mark.parametrize("value", [None, True, -5, 2**40, 0.5, "ä", (), (1, ("a", [])), [1, {"a": (2,)}], {}])
def test_plain_values(value: object) -> None:
    file = SavedFile(value)
    assert torch.load(io.BytesIO(file.pieces[0])) == value
    assert len(file.pieces[0]) == file.size


def test_classes_and_constants_by_name() -> None:
    size = Call(Global("torch", "Size"), ((2, 3),))
    content = SavedFile({"size": size, "dtype": Global("torch", "bfloat16")}).pieces[0]
    assert torch.load(io.BytesIO(content)) == {"size": torch.Size((2, 3)), "dtype": torch.bfloat16}
    assert pickled(size) == pickled(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_reads_the_tensors_of_a_distributed_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    """By torch's own reader; of tensors above 64 KiB the file is made without their numbers."""
    folder = there(model(tmp_path / "model", dtype=dtype), tmp_path / "out", Kind.MEGATRON, 2, 2)
    state = {
        tensor.key: torch.empty(tensor.size, dtype=dtype)
        for tensor in global_tensors(GQA)
        if "embedding" in tensor.key or "linear_proj" in tensor.key or "norm" in tensor.key
    }
    checkpoint.load(state, checkpoint_id=str(folder), no_dist=True)
    weights = open_weights(tmp_path / "model")
    assert torch.equal(state["embedding.word_embeddings.weight"], weights["model.embed_tokens.weight"])
    for layer in range(GQA.num_layers):
        wanted = weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
        assert torch.equal(state["decoder.layers.self_attention.linear_proj.weight"][layer], wanted)


def test_a_large_tensor_has_room_that_is_not_in_memory() -> None:
    numbers = torch.arange(1 << 20, dtype=torch.int32).view(torch.float32)
    storage = torch.save(numbers, own := io.BytesIO()) or own.getvalue()
    from srlm_mega.checkpoints_conversion.bits import DType
    from srlm_mega.checkpoints_conversion.torch_dist import _envelope

    pieces, begin, size = _envelope((1 << 10, 1 << 10), DType.FLOAT32)
    content = bytearray(size)
    for offset, piece in pieces:
        content[offset : offset + len(piece)] = piece
    content[begin : begin + 4 * numbers.numel()] = numbers.numpy().tobytes()
    assert sum(len(piece) for _, piece in pieces) < 10_000 < len(storage)
    assert torch.equal(torch.load(io.BytesIO(content)).flatten().view(torch.int32), numbers.view(torch.int32))


def test_megatron_lm_finds_the_model(tmp_path: Path) -> None:
    """By what its checkpointing.py reads: the tracker, the folder that it names, the format, the common state."""
    there(model(tmp_path / "model"), tmp_path / "out", Kind.MEGATRON, 2, 2)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]
    assert located(tmp_path / "out") == tmp_path / "out/release"
    assert (tmp_path / "out/release/metadata.json").is_file()
    assert torch.load(tmp_path / "out/release/common.pt") == COMMON_STATE
    assert COMMON_STATE["checkpoint_version"] >= 3.0
    assert recognise(tmp_path / "out") is Kind.MEGATRON


def test_no_torch_is_imported(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    code = (
        "import sys\nfrom srlm_mega.cli.start import main\n"
        f"sys.argv = ['srlm', 'convert', {str(source)!r}, {str(tmp_path / 'out')!r}, '--to', 'megatron', '--tp', '2']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False", done.stderr
    assert (tmp_path / "out/release/conversion.json").is_file()
