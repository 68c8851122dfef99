"""A model from outside at the doors of a run: the stage M0, the start of `srlm run`, a job for Slurm; and on to M1."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from llama_folders import LLAMA_3, add_token, change_config, save_model
from places import TOY
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.huggingface import open_weights, read_shape
from srlm_mega.config import Config
from srlm_mega.config.file import load_config, read_yaml
from srlm_mega.config.outside_files import check_outside_files
from srlm_mega.errors import UserError
from srlm_mega.launch import slurm
from srlm_mega.launch.slurm import SlurmJob
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.base import make_base
from srlm_mega.stages.run_stages import joined_ranks, run_stage
from srlm_mega.stages.work import Work


def make_m0(config: Config) -> None:
    run, stage = RunDir(config.run.dir), find_stage(config, "M0")
    work = Work(
        run,
        config,
        stage,
        run.partial("M0"),
        Progress(config.run.dir / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    make_base(work)


def write_job(config: Config) -> None:
    job = SlurmJob("run", config)
    slurm.write_job(job, slurm.checked_script(job))


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is written, and no Slurm is asked."""
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)


every_door = pytest.mark.parametrize("door", [make_m0, check_outside_files, write_job])


def configuration(root: Path, model: dict[str, object]) -> Path:
    """A file with the toy's data, few of them, and this model."""
    raw = read_yaml(TOY)
    for section in ("pretrain", "parallel", "launch"):
        del raw[section]
    raw["model"], raw["run"] = {"seq_length": 128, **model}, {"dir": str(root / "run"), "rounds": 1}
    raw["seed_data"] |= {"num_documents": 0, "num_ift": 16, "num_eft": 16, "num_eft_eval": 16, "num_validation": 8}
    raw["sft"] |= {"train_iters": 2, "global_batch_size": 4}
    file = root / "my.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of a model like Llama 3.2, of which only the path is given."""
    save_model(tmp_path / "model", LLAMA_3 | {"vocab_size": 128})
    return load_config(configuration(tmp_path, {"path": str(tmp_path / "model")}), ["launch.launcher=slurm"])


@every_door
def test_a_right_one_is_taken(config: Config, door: Callable[[Config], None]) -> None:
    door(config)


@every_door
def test_ids_beyond_the_vocabulary(config: Config, door: Callable[[Config], None]) -> None:
    """With TP 2 such a run trains on embeddings of zeros."""
    assert config.model.path is not None
    add_token(config.model.path)
    with pytest.raises(UserError, match=r"model\.path: .*tokenizer\.json has 'beyond' with id 128"):
        door(config)


@every_door
def test_no_fast_tokenizer(config: Config, door: Callable[[Config], None]) -> None:
    assert config.model.path is not None
    (config.model.path / "tokenizer.json").rename(config.model.path / "tokenizer.model")
    with pytest.raises(UserError, match=r"model\.path: .*AutoTokenizer\.from_pretrained"):
        door(config)


@every_door
def test_an_output_that_is_not_the_embedding(config: Config, door: Callable[[Config], None]) -> None:
    assert config.model.path is not None
    file = config.model.path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.path: .*tie_word_embeddings true, and lm_head\.weight"):
        door(config)


def test_a_folder_that_changes_under_a_run(config: Config) -> None:
    """The stage's process loads the configuration, so it compares the shape again."""
    assert config.model.path is not None
    change_config(config.model.path, rope_theta=1.0, rope_parameters=None, rope_scaling=None)
    resolved = config.run.dir.with_suffix(".yaml")
    resolved.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.raises(UserError, match=r"rotary_base is 1\.0, configured 500000\.0; .*rope_scaling is None"):
        load_config(resolved)


@pytest.mark.parametrize("given", ["path", "shape"])
def test_a_tied_and_scaled_model_goes_on_to_m1(tmp_path: Path, given: str) -> None:
    """A folder, and random weights of the same shape."""
    if given == "path":
        save_model(tmp_path / "model", LLAMA_3)
        model: dict[str, object] = {"path": str(tmp_path / "model")}
    else:
        model = {
            "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
            "vocab_size": 131, "max_position_embeddings": 16384, "rotary_base": 500000, "tie_word_embeddings": True,
            "rope_scaling": {"factor": 32},
        }  # fmt: skip
    file = configuration(tmp_path, model)
    config, run = load_config(file), RunDir(tmp_path / "run")
    stages = [find_stage(config, name) for name in ("seed", "M0", "M1")]
    with joined_ranks(config, stages):
        assert [run_stage(run, Samplers(config, run.replicas), stage) for stage in stages] == [0, 0, 0]
    start, trained = (tmp_path / "run" / name / "huggingface" for name in ("M0", "M1"))
    assert read_shape(trained) == read_shape(start) == config.model.shape
    assert "lm_head.weight" not in open_weights(trained)
    llama = LlamaForCausalLM.from_pretrained(trained)
    assert llama.config.tie_word_embeddings and llama.config.rope_parameters["rope_type"] == "llama3"
    assert len(AutoTokenizer.from_pretrained(trained)) == 128
