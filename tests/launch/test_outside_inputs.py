"""What a job reads from outside is looked at before it waits in a queue."""

import gzip
import json
import re
from pathlib import Path

import pytest
from llama_folders import LLAMA_3, change_config, save_model
from places import ROOT

from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.launch import slurm
from srlm_mega.launch.outside_inputs import unseen
from srlm_mega.launch.slurm import SlurmJob, checked_script

TOY = ROOT / "launch/configs/toy_cpu.yaml"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Slurm is asked; jobs start in the test's folder."""
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)


def check_text(*overrides: str) -> str:
    """The script of a job of the toy, checked as `srlm launch slurm` does."""
    return checked_script(SlurmJob("run", load_config(TOY, ["run.dir=run", "launch.launcher=slurm", *overrides])))


def check(*overrides: str) -> str:
    """The refusal of such a job, or nothing."""
    try:
        check_text(*overrides)
    except UserError as error:
        return str(error)
    return ""


def judge(folder: Path) -> tuple[str, str]:
    return "evaluation.pairwise=true", f"evaluation.pairwise_judge={{model: {folder}}}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound folder."""
    save_model(tmp_path / "model", LLAMA_3 | {"vocab_size": 128})
    return tmp_path / "model"


def test_sound_files_are_taken(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('\n{"text": "a"}\n')
    prompts = ("prompts.generator=file", f"prompts.path={tmp_path}/prompts.jsonl")
    assert check(*judge(model)) == check(*prompts) == check(f"prompts.writer={model}") == ""
    change_config(model, architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=1)
    assert check(*judge(model)) == "", "engines know models that we do not"


@pytest.mark.parametrize("key", ["prompts.writer", "evaluation.pairwise_judge"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("empty folder", "has no config.json"),
        ("no weights", "has no weights"),
        ("no tokenizer", "has no tokenizer.json"),
        ("empty weights", "model.safetensors is empty (0 bytes)"),
        ("dangling", "model.safetensors is not there"),
        ("incomplete", "model-00002-of-00002.safetensors is not there"),
        ("another shape", "model.embed_tokens.weight"),
        ("broken index", "index.json has no `weight_map`"),
        ("number in the index", "a is in 5, which is no file of this folder"),
        ("index that leads out", "which is no file of this folder"),
        ("broken config", "config.json"),
    ],
)
def test_models_that_cannot_be_loaded(key: str, fault: str, said: str, model: Path) -> None:
    weights = model / "model.safetensors"
    match fault:
        case "empty folder":
            for file in model.iterdir():
                file.unlink()
        case "no weights":
            weights.unlink()
        case "no tokenizer":
            (model / "tokenizer.json").unlink()
        case "empty weights":
            weights.write_bytes(b"")
        case "dangling":
            weights.unlink()
            weights.symlink_to("../../blobs/gone")
        case "incomplete":
            index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
        case "broken index":
            (model / "model.safetensors.index.json").write_text('{"weight_map": 3}')
        case "number in the index":
            (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
        case "index that leads out":
            (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')
        case "broken config":
            (model / "config.json").write_text("{")
        case _:
            change_config(model, vocab_size=256)
    refused = check(*judge(model)) if key.startswith("evaluation") else check(f"{key}={model}")
    assert key in refused and said in refused, refused
    assert len(refused.splitlines()) == 2, "each fault is said once"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b"", "is empty (0 bytes)"),
        ("p.jsonl", b"\n \n", "is empty (3 bytes)"),
        ("p.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("p.jsonl.gz", b"", "is empty (0 bytes)"),
        ("p.jsonl.gz", b'{"text": "a"}\n', "cannot be read"),
        ("p.jsonl.gz", gzip.compress(b"\n" * 90_000, mtime=0)[:-40], "cannot be read"),
    ],
)
def test_files_without_content(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for keys in (("prompts.generator=file", f"prompts.path={name}"), (f"judge.template={name}",)):
        refused = check(*keys)
        assert f"{keys[-1].partition('=')[0]}: " in refused and said in refused, refused


def test_data_are_looked_at_in_every_form(tmp_path: Path) -> None:
    """As the stage will read them: folders, arrays, gzip under any name; what it would refuse is refused."""
    keys = ("prompts.generator=file", "prompts.path=data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/README.md").touch()
    assert "prompts.path: " in (refused := check(*keys)) and "a folder without data files" in refused
    (tmp_path / "data/a.jsonl").write_bytes(gzip.compress(b'[{"text": "a"}]', mtime=0))
    assert check(*keys) == ""
    (tmp_path / "data/a.jsonl").write_bytes(b"PK\x03\x04")
    assert "a zip archive" in check(*keys)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_that_does_not_see_a_file(
    runtime: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("data")
    (elsewhere / "p.jsonl").write_text("{}\n")
    keys = ("launch.slurm.container=image", f"launch.slurm.container_runtime={runtime}", "prompts.generator=file")
    refused = check(*keys, f"prompts.path={elsewhere}/p.jsonl")
    assert f"launch.slurm.container does not see {elsewhere}/p.jsonl (prompts.path): add {elsewhere} to" in refused
    assert check(*keys, f"prompts.path={elsewhere}/p.jsonl", f"launch.slurm.mounts=[{elsewhere}]") == ""
    (tmp_path / "link.jsonl").symlink_to(elsewhere / "p.jsonl")
    assert f"to which {tmp_path}/link.jsonl leads (prompts.path)" in check(*keys, "prompts.path=link.jsonl")
    assert check("prompts.generator=file", "prompts.path=link.jsonl") == "", "no container"
    run = tmp_path_factory.mktemp("runs")
    sampler = ("sampler.container=image", f"run.dir={run}/a")
    assert f"sampler.container does not see {run}/a (run.dir): add {run} to sampler.mounts" in check(*sampler)
    assert check(*sampler, f"sampler.mounts=[{run}]") == ""


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_run_behind_a_link_is_there_under_both_names(
    runtime: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Processes are told the one that the configuration has."""
    disk, home = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("home")
    (home / "runs").symlink_to(disk)
    keys = ("launch.slurm.container=image", f"launch.slurm.container_runtime={runtime}", f"run.dir={home}/runs/a")
    script = check_text(*keys)
    for name in (disk / "a", home / "runs/a"):
        assert re.search(rf"[=,]{name}[:, \n]", script), script
    sampler = ("sampler.container=image", f"run.dir={home}/runs/a")
    assert check(*sampler, f"sampler.mounts=[{home}/runs]") == ""


def test_a_snapshot_of_the_hub_leads_to_its_blobs(tmp_path: Path) -> None:
    """The mount of the snapshot alone is a folder of links that lead nowhere."""
    stored = tmp_path / "hub/models--org--name"
    snapshot = stored / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (stored / "blobs").mkdir()
    (stored / "blobs/0f").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0f")
    named = {"model.path": snapshot}
    (line,) = unseen(named, tmp_path / "work", [snapshot], "sampler.container", "sampler.mounts")
    blobs = stored / "blobs"
    leads = f"sampler.container does not see {blobs}/0f, to which {snapshot} leads (model.path)"
    assert line == f"{leads}: add {blobs} to sampler.mounts"
    assert list(unseen(named, tmp_path / "work", [snapshot, stored / "blobs"], "", "")) == []
    assert list(unseen(named, tmp_path / "work", [stored], "", "")) == []


def test_a_run_that_was_begun_with_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srlm run` would refuse it, after the wait in the queue."""

    def refuse(stages: object, made: dict[str, object], *rest: object) -> None:
        if "M1" in made:
            raise UserError("was made with another configuration")

    monkeypatch.setattr(slurm, "check_all_unchanged", refuse)
    assert check() == "", "it is not begun"
    monkeypatch.setattr(slurm.RunDir, "manifest", lambda run, name: object() if name == "M1" else None)
    assert "was made with another configuration" in check()


def test_a_file_that_was_read_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `srlm run` resumes without it."""
    gone = (
        "seed_data.source=jsonl",
        "seed_data.path=gone.jsonl",
        "seed_data.ranked_path=gone.jsonl",
        "eft.enabled=false",
    )
    assert "seed_data.path: there is no gone.jsonl" in check(*gone)
    monkeypatch.setattr(slurm.RunDir, "manifest", lambda run, name: object() if name == "seed" else None)
    monkeypatch.setattr(slurm, "check_begun", lambda job: None)
    assert check(*gone) == ""
