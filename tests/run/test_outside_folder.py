"""A model's folder from outside is known by what is in it."""

import shutil
from pathlib import Path

from srlm_mega.run.outside_folder import content_hash


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
    (folder / "config.json").rename(folder / "shards/config.json")
    assert content_hash(folder) != before
