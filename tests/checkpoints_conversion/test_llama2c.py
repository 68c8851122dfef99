"""llama2.c's format, and stories260K: a model that somebody trained, through the converter."""

import struct
from pathlib import Path

import pytest
import torch
from llama2c import convert, half_split_rotary, read
from merge_shards import merge_shards
from stories import ONCE_UPON_A_TIME, forward, restored
from torch import Tensor
from transformers import LlamaForCausalLM

from srlm_mega.checkpoints_conversion.huggingface import open_weights, write_folder
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.megatron import load_shard
from srlm_mega.checkpoints_conversion.placement import placements

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as llama2.c has it."""
    return restored(shared_data / "stories260K.bin", tmp_path_factory.mktemp("stories") / "stories260K.bin")


@pytest.fixture(scope="module")
def folder(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder."""
    target = tmp_path_factory.mktemp("stories") / "huggingface"
    write_folder(target, *convert(stories), tokenizer_from=None)
    return target


def huggingface_logits(folder: Path, ids: list[int]) -> Tensor:
    """[s, v] by transformers."""
    with torch.no_grad():
        logits: Tensor = LlamaForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    return logits


def nats(logits: Tensor, ids: list[int]) -> float:
    """Mean -log p of `ids` after the first."""
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()


def test_the_header_is_read(stories: Path) -> None:
    shape, weights = convert(stories)
    assert shape == LlamaShape(5, 64, 172, 8, 4, 512, 512, 1e-5, 10000.0, tie_word_embeddings=True)
    assert weights["model.layers.4.self_attn.k_proj.weight"].shape == (32, 64)


def test_the_rotary_tables_behind_the_weights_are_where_they_belong(stories: Path) -> None:
    """cos and sin of position * 10000^(-2i / 8): every tensor before them has its right size."""
    _, tensors = read(stories)
    angles = torch.outer(torch.arange(512).float(), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    torch.testing.assert_close(tensors["rotary_cos"], angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(tensors["rotary_sin"], angles.sin(), atol=1e-4, rtol=0)


def test_the_model_is_the_trained_one(stories: Path) -> None:
    """A trained model is sure of its stories' beginning, but not when a matrix lies across."""
    shape, tensors = read(stories)
    logits = forward(shape, tensors, ONCE_UPON_A_TIME)
    assert nats(logits, ONCE_UPON_A_TIME) < 0.5
    assert logits.argmax(-1)[:4].tolist() == ONCE_UPON_A_TIME[1:5]
    across = forward(shape, tensors | {"wq": tensors["wq"].transpose(1, 2)}, ONCE_UPON_A_TIME)
    assert nats(across, ONCE_UPON_A_TIME) > 1


def test_logits_equal_llama2c(stories: Path, folder: Path) -> None:
    want = forward(*read(stories), ONCE_UPON_A_TIME)
    assert (huggingface_logits(folder, ONCE_UPON_A_TIME) - want).abs().max() < TOLERANCE


def test_unpermuted_rotary_would_be_seen(stories: Path, tmp_path: Path) -> None:
    """Negative control: q and k in Meta's order."""
    shape, weights = convert(stories)
    _, tensors = read(stories)
    for layer in range(shape.num_layers):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = tensors["wq"][layer]
        weights[f"model.layers.{layer}.self_attn.k_proj.weight"] = tensors["wk"][layer]
    write_folder(tmp_path, shape, weights, tokenizer_from=None)
    want = forward(*read(stories), ONCE_UPON_A_TIME)
    assert (huggingface_logits(tmp_path, ONCE_UPON_A_TIME) - want).abs().max() > 1


def test_transformers_tells_the_story(stories: Path, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    story = model.generate(torch.tensor([[1]]), max_new_tokens=32, do_sample=False)[0].tolist()
    assert story[: len(ONCE_UPON_A_TIME)] == ONCE_UPON_A_TIME
    assert forward(*read(stories), story).argmax(-1)[:-1].tolist() == story[1:]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_merge_bit_identically(folder: Path, tp: int) -> None:
    weights = open_weights(folder)
    shape = LlamaShape(5, 64, 172, 8, 4, 512, 512, 1e-5, 10000.0, tie_word_embeddings=True)
    shards = [(place, load_shard(weights, shape, place)) for place in placements(shape, tp, pp=1)]
    merged = merge_shards(shards, shape)
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], weights[name]) for name in weights)


def test_five_layers_refuse_two_stages(stories: Path) -> None:
    shape, _ = convert(stories)
    with pytest.raises(ValueError, match=r"5 layers / PP 2 leaves 1 over \(5 = 2 \* 2 \+ 1\)"):
        placements(shape, tp=1, pp=2)


def tiny_file(path: Path, vocab: int, extra: int = 0) -> Path:
    """1 layer, dim 4, hidden 6, 2 heads, 1 kv head, length 3; the n-th weight of the file is n."""
    tensors = 5 * 4 + 4 + 4 * 4 + 2 * 2 * 4 + 4 * 4 + 4 + 3 * 4 * 6 + 4 + 2 * 3 * 1 + (5 * 4 if vocab < 0 else 0)
    values = torch.arange(tensors + extra, dtype=torch.float32)
    path.write_bytes(struct.pack("<7i", 4, 6, 1, 2, 1, vocab, 3) + values.numpy().tobytes())
    return path


def test_a_file_worked_out_by_hand(tmp_path: Path) -> None:
    """Embedding 0-19, attention norm 20-23, wq 24-39, wk 40-47, wv 48-55, wo 56-71, mlp norm 72-75, w1 76-99,
    w2 100-123, w3 124-147, final norm 148-151, rotary tables 152-157, output 158-177. Heads have d = 2: one pair
    each, which stays where it is."""
    shape, weights = convert(tiny_file(tmp_path / "untied.bin", vocab=-5))
    assert shape == LlamaShape(1, 4, 6, 2, 1, 5, 3, 1e-5, 10000.0, tie_word_embeddings=False)
    layer = "model.layers.0."
    firsts = {
        "model.embed_tokens": 0, layer + "input_layernorm": 20, layer + "self_attn.q_proj": 24,
        layer + "self_attn.k_proj": 40, layer + "self_attn.v_proj": 48, layer + "self_attn.o_proj": 56,
        layer + "post_attention_layernorm": 72, layer + "mlp.gate_proj": 76, layer + "mlp.down_proj": 100,
        layer + "mlp.up_proj": 124, "model.norm": 148, "lm_head": 158,
    }  # fmt: skip
    assert {name: weights[f"{name}.weight"].flatten()[0].item() for name in firsts} == firsts
    assert len(weights) == len(firsts)


def test_rotary_rows_worked_out_by_hand() -> None:
    """Two heads of d = 6: pairs (0, 1), (2, 3), (4, 5) become (0, 3), (1, 4), (2, 5) of the new order."""
    rows = torch.arange(12.0)[:, None]
    assert half_split_rotary(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_other_files_are_refused(tmp_path: Path) -> None:
    short, long = tmp_path / "short.bin", tiny_file(tmp_path / "long.bin", vocab=5, extra=1)
    short.write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"short\.bin has 4 bytes, not even a header"):
        convert(short)
    with pytest.raises(ValueError, match=r"long\.bin has 664 bytes, by its header it should have 660"):
        convert(long)
    short.write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"does not begin with llama2\.c's header"):
        convert(short)
