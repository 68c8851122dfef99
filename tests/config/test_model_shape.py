"""The shape of a model that its folder says: read, compared with what is given, and found in the hub cache."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from llama_folders import LLAMA_3_2_1B, SMOLLM2_135M, change_config, write_config
from places import CONFIGS, TOY

from srlm_mega.checkpoints_conversion.llama import LlamaShape, RopeScaling
from srlm_mega.config import Config
from srlm_mega.config.file import leaves, load_config, origins, parse_config, read_yaml, to_yaml
from srlm_mega.config.outside_files import check_outside_files
from srlm_mega.config.outside_models import shape_in
from srlm_mega.errors import UserError

LLAMA3_SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)


def with_model(**model: Any) -> dict[str, Any]:
    """The toy's sections with another section `model`, for one process."""
    raw = read_yaml(TOY)
    one = {"pretrain": None, "parallel": {}, "launch": {}}
    return (
        raw | one | {"model": {key: str(value) if isinstance(value, Path) else value for key, value in model.items()}}
    )


def loaded(**model: Any) -> Config:
    return parse_config(with_model(**model), "my.yaml")


def test_only_the_path_is_needed(tmp_path: Path) -> None:
    llama = loaded(path=write_config(tmp_path / "llama", LLAMA_3_2_1B), seq_length=128).model
    assert llama.shape == LlamaShape(
        16, 2048, 8192, 32, 8, 128256, 131072, 1e-5, 500000.0, tie_word_embeddings=True, rope_scaling=LLAMA3_SCALING
    )
    smol = loaded(path=write_config(tmp_path / "smol", SMOLLM2_135M), seq_length=128).model
    assert smol.shape == LlamaShape(30, 576, 1536, 9, 3, 49152, 8192, 1e-5, 100000.0, tie_word_embeddings=True)


def test_parameters_are_those_of_the_published_models(tmp_path: Path) -> None:
    """By the numbers of transformers' `num_parameters`, which counts a tied embedding once."""
    for settings, parameters in ((LLAMA_3_2_1B, 1_235_814_400), (SMOLLM2_135M, 134_515_008)):
        folder = write_config(tmp_path / str(parameters), settings)
        assert loaded(path=folder, seq_length=128).model.sizes.parameters == parameters


def test_the_resolved_configuration_is_the_whole_shape(tmp_path: Path) -> None:
    config = loaded(path=write_config(tmp_path / "llama", LLAMA_3_2_1B), seq_length=128)
    values = leaves(config)
    assert values["model.tie_word_embeddings"] is True and values["model.rope_scaling.factor"] == 32.0
    assert values["model.num_layers"] == 16
    (tmp_path / "llama/config.json").unlink()
    assert parse_config(yaml.safe_load(to_yaml(config)), "resolved") == config, "it needs no folder"


def test_where_a_value_of_the_folder_comes_from(tmp_path: Path) -> None:
    folder, file = write_config(tmp_path / "llama", LLAMA_3_2_1B), tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(with_model(path=folder, seq_length=128, hidden_size=2048)))
    where = origins(file, [])
    assert where["model.num_layers"] == where["model.rope_scaling.factor"] == "config.json"
    assert where["model.tie_word_embeddings"] == where["model.norm_epsilon"] == "config.json"
    assert where["model.hidden_size"] == where["model.seq_length"] == "my.yaml"
    assert where["model.init_method_std"] == "default"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_layers": 17}, "num_layers is 16, configured 17"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is True, configured False"),
        ({"rope_scaling": None}, "rope_scaling is {'factor': 32.0"),
        ({"rope_scaling": {"factor": 8}}, "configured {'factor': 8.0"),
        ({"rotary_base": 10000, "vocab_size": 32000}, "vocab_size is 128256, configured 32000; rotary_base is"),
    ],
)
def test_a_given_value_must_be_the_folders(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    folder = write_config(tmp_path / "llama", LLAMA_3_2_1B)
    with pytest.raises(UserError, match="does not have the configured shape") as error:
        loaded(path=folder, seq_length=128, **given)
    assert said in str(error.value) and str(folder / "config.json") in str(error.value)
    named = {word.strip(",;.") for word in str(error.value).split() if word.startswith("model.")}
    assert named <= {"model.path"}, "a message names keys that exist"


def test_null_takes_a_number_out_of_a_preset(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "smol", SMOLLM2_135M)
    keys = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    one = ["launch.processes_per_node=1", "pipeline_model_parallel_size=1", "pretrain=null", f"model.path={folder}"]
    nulls = [f"model.{key}=null" for key in (*keys, "max_position_embeddings")]
    assert load_config(TOY, [*one, *nulls]).model.shape.num_layers == 30
    with pytest.raises(UserError, match="num_layers is 30, configured 2"):
        load_config(TOY, one)


@pytest.mark.parametrize("path", [None, "nowhere", "/no/such/model"])
def test_without_a_folder_the_message_says_both_ways_out(path: str | None) -> None:
    with pytest.raises(UserError) as error:
        loaded(path=path, num_layers=2, seq_length=128)
    assert str(error.value).count("\n") == 1, "one message"
    assert "hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, vocab_size are not" in str(error.value)
    assert "Set model.path to a Hugging Face model folder" in str(error.value) and "or give them" in str(error.value)
    assert path is None or f"there is no {path}" in str(error.value)


def test_a_misspelled_key_is_named_rather_than_a_missing_one() -> None:
    with pytest.raises(UserError, match=r"unknown key model\.num_layer\. Did you mean model\.num_layers"):
        loaded(num_layer=2, seq_length=128)


def test_a_preset_needs_no_folder_of_its_model() -> None:
    assert load_config(CONFIGS / "llama2_70b_64gpu.yaml").model.path == Path("models/Llama-2-70b-hf")


def test_no_plain_llama_is_refused_with_its_file(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "gpt", SMOLLM2_135M | {"model_type": "gpt2"})
    with pytest.raises(UserError, match=r"gpt/config\.json: the model's model_type is 'gpt2'"):
        loaded(path=folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        loaded(path=folder)
    change = write_config(tmp_path / "wide", SMOLLM2_135M)
    change_config(change, head_dim=128)
    with pytest.raises(UserError, match=r"head_dim 128 is not hidden_size / num_attention_heads = 576 / 9 = 64"):
        loaded(path=change)


def test_scaling_that_the_trainer_does_not_compute_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "llama", LLAMA_3_2_1B)
    change_config(folder, rope_scaling=LLAMA_3_2_1B["rope_scaling"] | {"low_freq_factor": 2.0})
    with pytest.raises(
        UserError, match=r"rope_scaling is .*low_freq_factor=2\.0.* trainer computes only .* any factor"
    ):
        loaded(path=folder, seq_length=128)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model, as `hf download` leaves it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    stored = tmp_path / "hub/models--org--tiny-Llama.2"
    write_config(stored / "snapshots/abc", SMOLLM2_135M)
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("abc")
    return stored


def test_a_model_by_its_id_in_the_hub_cache(cache: Path) -> None:
    config = loaded(path="org/tiny-Llama.2", seq_length=128)
    assert config.model.path == cache / "snapshots/abc" and config.model.num_layers == 30
    write_config(Path("org/tiny-Llama.2"), LLAMA_3_2_1B)  # a folder of this name comes first
    assert loaded(path="org/tiny-Llama.2", seq_length=128).model.num_layers == 16


@pytest.mark.parametrize("name", ["org/other", "org/tiny-Llama.2"])
def test_an_id_that_is_not_cached(cache: Path, name: str) -> None:
    """Not at all, or a download that was broken off."""
    (cache / "refs/main").unlink()
    said = rf"there is no {name}, nor .* in the hub cache .*hub \(hf download {name}\)"
    with pytest.raises(UserError, match=said):
        loaded(path=name)
    config = parse_config(with_model(path=name, seq_length=128, **shape_in(cache / "snapshots/abc")), "my.yaml")
    with pytest.raises(UserError, match=rf"model\.path: {said}"):
        check_outside_files(config)
