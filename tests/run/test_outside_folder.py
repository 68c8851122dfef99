"""A model's folder from outside is known by what is in it."""

import shutil
from pathlib import Path

import pytest

from srlm_mega.errors import UserError
from srlm_mega.run.manifest import Identity
from srlm_mega.run.outside_folder import check_undamaged, content_hash
from srlm_mega.run.run_dir import RunDir


def test_the_hash_of_a_folder_is_that_of_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "shards").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "shards/one.safetensors").write_bytes(b"weights")
    before = content_hash(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "proof.json").write_text("{}")
    (moved / ".cache").mkdir()
    (moved / ".cache/one.metadata").write_text("downloaded at noon")
    linked = tmp_path / "linked"
    linked.symlink_to(moved)
    assert content_hash(moved) == content_hash(linked) == before
    (moved / "shards/one.safetensors").write_bytes(b"Weights")
    assert content_hash(moved) != before
    for name in ("manifest.json", "identity.json", "evaluation/config.json"):  # what has a meaning in a run only
        with_it = shutil.copytree(folder, tmp_path / name.partition("/")[0])
        (with_it / name).parent.mkdir(exist_ok=True)
        (with_it / name).write_text("{}")
        assert content_hash(with_it) != before
    (folder / "config.json").rename(folder / "shards/config.json")
    assert content_hash(folder) != before


def test_a_model_of_a_run_is_verified_behind_a_link(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    model = run.begin(Identity("M2", {}, {}), resumable=False) / "huggingface"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    run.commit(Identity("M2", {}, {}), 0, 0.0, "test", {})
    run.config_file.touch()
    run.output("M2").rename(tmp_path / "disk")
    run.output("M2").symlink_to(tmp_path / "disk")
    check_undamaged(run.weights("M2"))
    (tmp_path / "disk/huggingface/model.safetensors").write_bytes(b"Weights")
    with pytest.raises(UserError, match="was altered"):
        check_undamaged(run.weights("M2"))
