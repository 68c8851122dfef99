"""Folders from outside that two readers would read differently, or whose tokenizer does not fit: refused, with the
files and the remedy, wherever a folder is opened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from llama_folders import LLAMA_3, PLAIN, add_token, change_config, save_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from srlm_mega.checkpoints_conversion import safetensors_file
from srlm_mega.checkpoints_conversion.convert import open_checkpoint
from srlm_mega.checkpoints_conversion.huggingface import open_weights
from srlm_mega.checkpoints_conversion.huggingface_files import INDEX, WEIGHTS
from srlm_mega.checkpoints_conversion.model_folder import check_model_folder
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling.backends import open_sampler

EMBEDDING, OUTPUT, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"


def open_by_sampler(folder: Path) -> None:
    open_sampler(SamplerConfig(device="cpu"), folder, end_ids=(2,)).close()


READERS: dict[str, Callable[[Path], object]] = {
    "check": lambda folder: check_model_folder(folder, allow_unverified=False),
    "convert": open_checkpoint,
    "trainer": open_weights,
    "sampler": open_by_sampler,
}
every_reader = pytest.mark.parametrize("reader", READERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "plain", PLAIN)
    save_model(folder / "llama_3", LLAMA_3)
    return folder


@pytest.fixture
def plain(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "plain", tmp_path / "plain"))


@pytest.fixture
def llama_3(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "llama_3", tmp_path / "llama_3"))


def add_shards(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> None:
    """Add two shards with an index to `model.safetensors`, from its tensors after a change."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    names = list(tensors)
    files = {
        name: f"model-0000{1 + (place > len(names) // 2)}-of-00002.safetensors" for place, name in enumerate(names)
    }
    for file in set(files.values()):
        part = {name: tensor.clone() for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_bytes(orjson.dumps({"metadata": {}, "weight_map": files}))


def change_last_number(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN].view(-1)[-1] += 1


@every_reader
def test_models_that_transformers_saved_are_opened(models: Path, reader: str) -> None:
    READERS[reader](models / "plain")
    READERS[reader](models / "llama_3")


@every_reader
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_last_number, DOWN),
        (lambda tensors: tensors.pop(DOWN), DOWN),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].bfloat16()}), DOWN),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}), DOWN),
    ],
    ids=["bytes", "missing", "more", "dtype", "shape"],
)
def test_two_models_in_one_folder(
    plain: Path, reader: str, change: Callable[[dict[str, Tensor]], object], name: str
) -> None:
    add_shards(plain, change)
    said = rf"plain holds two models: {name} differs between {WEIGHTS}.* of {INDEX}: remove {WEIGHTS} or {INDEX}"
    with pytest.raises(ValueError, match=said):
        READERS[reader](plain)


@every_reader
def test_the_same_model_twice_is_one(plain: Path, reader: str) -> None:
    add_shards(plain, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    READERS[reader](plain)
    names = dict.fromkeys(load_file(plain / WEIGHTS), WEIGHTS)
    (plain / INDEX).write_bytes(orjson.dumps({"weight_map": names}))  # an index of the one file
    READERS[reader](plain)


def test_the_comparison_reads_no_more_than_it_must(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, up to the first difference; nothing where headers differ or both are one file."""
    read: list[int] = []
    same = safetensors_file.same_blocks
    monkeypatch.setattr(safetensors_file, "same_blocks", lambda *files: read.append(files[-1]) or same(*files))
    add_shards(plain, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="two models"):
        open_weights(plain)
    assert read == []
    add_shards(plain, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    with pytest.raises(ValueError, match="two models"):
        open_weights(plain)
    assert len(read) == 1


@every_reader
def test_a_tied_output_that_is_not_the_embedding(llama_3: Path, reader: str) -> None:
    tensors = load_file(llama_3 / WEIGHTS)
    save_file(tensors | {OUTPUT: tensors[EMBEDDING].clone()}, llama_3 / WEIGHTS, {"format": "pt"})
    READERS[reader](llama_3)
    save_file(tensors | {OUTPUT: tensors[EMBEDDING] + 1}, llama_3 / WEIGHTS, {"format": "pt"})
    said = (
        rf"tie_word_embeddings true, and {OUTPUT} in {WEIGHTS} differs from {EMBEDDING} in {WEIGHTS}: "
        rf"set tie_word_embeddings to false in config\.json if .* or remove {OUTPUT}"
    )
    with pytest.raises(ValueError, match=said):
        READERS[reader](llama_3)
    change_config(llama_3, tie_word_embeddings=False)  # the remedy
    READERS[reader](llama_3)


def test_an_untied_model_without_an_output(llama_3: Path) -> None:
    change_config(llama_3, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=rf"has no tensor {OUTPUT}: set tie_word_embeddings to true"):
        READERS["check"](llama_3)


def test_ids_beyond_the_vocabulary(plain: Path, llama_3: Path) -> None:
    """An embedding may be larger than the tokenizer, and not smaller."""
    READERS["check"](llama_3)
    assert add_token(llama_3) == 128
    READERS["check"](llama_3)
    assert add_token(plain) == 128
    with pytest.raises(
        ValueError, match=r"tokenizer\.json has 'beyond' with id 128, .* ends at id 127 \(vocab_size 128"
    ):
        READERS["check"](plain)


def test_an_id_beyond_the_vocabulary_in_a_tokenizer_with_gaps(plain: Path) -> None:
    """A count of tokens would not show it."""
    file = plain / "tokenizer.json"
    fields = orjson.loads(file.read_bytes())
    vocabulary = fields["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] = 500
    file.write_bytes(orjson.dumps(fields))
    assert Tokenizer.from_file(str(file)).get_vocab_size() == 128
    with pytest.raises(ValueError, match=r"with id 500, and the model's embedding ends at id 127"):
        READERS["check"](plain)


def test_a_folder_without_a_fast_tokenizer(plain: Path) -> None:
    make = r"AutoTokenizer\.from_pretrained\('.*plain'\)\.save_pretrained\('.*plain'\)"
    (plain / "tokenizer.json").rename(plain / "away")
    with pytest.raises(ValueError, match=rf"plain has no tokenizer\.json\. .*: {make}"):
        READERS["check"](plain)
    (plain / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=rf"no tokenizer\.json \(tokenizer\.model alone is not read\)\. .*: {make}"):
        READERS["check"](plain)
    (plain / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read \(.*\): download it again"):
        READERS["check"](plain)
