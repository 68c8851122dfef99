"""Paths that lead to no model, for every command that takes one: each is told what it is, and the way out."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import pytest
from llama_folders import save_model
from test_convert import model, there

from srlm_mega.checkpoints_conversion.convert import Kind, open_checkpoint
from srlm_mega.checkpoints_conversion.model_folder import read_tokenizer
from srlm_mega.checkpoints_conversion.verify import prove
from srlm_mega.config.outside_files import folder_problem
from srlm_mega.config.outside_models import shape_in
from srlm_mega.errors import UserError
from srlm_mega.run.outside_folder import check_undamaged
from srlm_mega.stages.head_to_head import RunModel, writer_at
from srlm_mega.stages.responses import Writer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


def at_start(path: Path) -> None:
    """What `srlm run` says of a model.path before anything else."""
    if (problem := folder_problem(path, sampled=False)) is not None:
        raise UserError(problem)


CHECKPOINT: dict[str, Callable[[Path], object]] = {"convert": open_checkpoint, "verify": lambda path: prove(path, path)}
FOLDER: dict[str, Callable[[Path], object]] = {"run": at_start, "judge": Writer.outside, "head-to-head": writer_at}
RUN: dict[str, Callable[[Path], object]] = {"export": RunModel.at}
ALL = CHECKPOINT | FOLDER | RUN


def assert_said(commands: dict[str, Callable[[Path], object]], path: Path, *words: str) -> None:
    for name, command in commands.items():
        with pytest.raises(ValueError) as said:
            command(path)
        assert all(word in str(said.value) for word in words), f"{name}: {said.value}"
        assert len(str(said.value)) < 2000


def hub(root: Path, *snapshots: str) -> Path:
    """A model's folder of the hub's cache."""
    folder = root / "hub/models--meta-llama--Llama-2-7b-hf"
    for name in ("blobs", "refs", "snapshots", *(f"snapshots/{snapshot}" for snapshot in snapshots)):
        (folder / name).mkdir(parents=True)
    for snapshot in snapshots:
        (folder / "snapshots" / snapshot / "config.json").write_text("{}")
    return folder


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = hub(tmp_path, "01c7f73d")
    for place in (folder, folder / "snapshots", folder / "blobs", tmp_path / "hub", tmp_path):
        assert_said(ALL, place, "hub's cache", str(folder / "snapshots/01c7f73d"))
    rmtree(folder / "snapshots/01c7f73d")
    assert_said(ALL, folder, "without a snapshot", "hf download meta-llama/Llama-2-7b-hf")


def test_the_snapshot_and_the_models_of_the_hubs_cache_that_are_named(tmp_path: Path) -> None:
    folder = hub(tmp_path / "huggingface", "old", "main", "newest")
    (folder / "refs/main").write_text("main")
    for age, name in enumerate(("newest", "main", "old")):
        os.utime(folder / "snapshots" / name, (9e8 - age, 9e8 - age))
    for place in (folder, folder / "refs", tmp_path / "huggingface", tmp_path):
        assert_said(ALL, place, f"give {folder / 'snapshots/main'}")
    (folder / "snapshots/main/config.json").unlink()
    assert_said(ALL, folder / "snapshots/main", f"give {folder / 'snapshots/newest'}")
    other = Path(copytree(folder, folder.with_name("models--a--b")))
    assert_said(ALL, folder.parent, f"give {other / 'snapshots/newest'} (or another model, such as {folder}")
    rmtree(folder / "snapshots")
    (folder / "snapshots/main").mkdir(parents=True)
    for place in (folder, folder / "snapshots/main"):
        assert_said(ALL, place, "hf download meta-llama/Llama-2-7b-hf")
    (folder / "snapshots/main/model-Q4_0.gguf").touch()
    assert_said(ALL, folder, f"give {folder / 'snapshots/main/model-Q4_0.gguf'}")


def test_links_to_nothing(tmp_path: Path) -> None:
    os.symlink("/gone/Llama-2-7b-hf", tmp_path / "link")
    assert_said(
        ALL,
        tmp_path / "link",
        f"{tmp_path / 'link'} is not there: it is a link to /gone/Llama-2-7b-hf, which does not exist",
    )
    assert_said(ALL, tmp_path / "link/snapshots/01c7", f"{tmp_path / 'link'} is not there: it is a link to /gone")
    folder = save_model(tmp_path / "model")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        changed = Path(copytree(folder, tmp_path / f"without {name}"))
        (changed / name).unlink()
        os.symlink(f"../../blobs/{name}", changed / name)
        assert_said(
            CHECKPOINT | FOLDER, changed, f"{changed / name} is not there: it is a link to ../../blobs/{name}", "cp -rL"
        )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_pointers_of_git_lfs(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "my model")
    (folder / name).write_text(POINTER)
    assert_said(CHECKPOINT | FOLDER, folder, f"{folder / name} is a Git LFS pointer", f"git -C '{folder}' lfs pull")


def test_pointers_that_a_configuration_or_a_tokenizer_names(tmp_path: Path) -> None:
    for name, read in (("config.json", lambda file: shape_in(file.parent)), ("tokenizer.json", read_tokenizer)):
        (tmp_path / name).write_text(POINTER)
        assert_said({name: read}, tmp_path / name, "is a Git LFS pointer")


def test_a_pointer_for_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    assert_said(CHECKPOINT, tmp_path / "model.gguf", "model.gguf is a Git LFS pointer")


def megatron(root: Path, *iterations: str) -> Path:
    """Megatron-LM's folder of checkpoints, as a training leaves it but for the config.json."""
    made = there(model(root / "model"), root / "made", Kind.MEGATRON, 2, 1)
    for iteration in iterations:
        copytree(made, root / "training" / iteration)
    return root / "training"


def test_the_parent_folder_of_megatron_is_followed(tmp_path: Path) -> None:
    parent = megatron(tmp_path, "iter_0000010", "iter_0000020")
    (parent / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert open_checkpoint(parent).folder == parent / "iter_0000020"
    assert prove(parent, there(parent, tmp_path / "back", Kind.HUGGINGFACE)).num_tensors == 39
    for place in (parent, parent / "iter_0000020"):
        assert_said(FOLDER | RUN, place, "is a Megatron checkpoint", "srlm convert", "--to huggingface")
    for left, words in (
        *((word, ["should say a number of iterations or release", "iter_0000020"]) for word in ("x", "", "10.0", "..")),
        ("release", ["training/release, which does not exist", "iter_0000020"]),
        ("30", ["iter_0000030", "does not exist", "iter_0000020"]),
    ):
        (parent / "latest_checkpointed_iteration.txt").write_text(left)
        assert_said(ALL, parent, *words)
    (parent / "latest_checkpointed_iteration.txt").write_text(POINTER)
    assert_said(ALL, parent, "latest_checkpointed_iteration.txt is a Git LFS pointer")
    (parent / "latest_checkpointed_iteration.txt").unlink()
    assert_said(ALL, parent, "without latest_checkpointed_iteration.txt", str(parent / "iter_0000020"))


def test_what_was_proven_is_compared_from_the_parent_folder_too(tmp_path: Path) -> None:
    made = there(model(tmp_path / "model"), tmp_path / "made", Kind.MEGATRON)
    prove(tmp_path / "model", tmp_path / "made").save()
    check_undamaged(tmp_path / "made")
    with (made / "__0_0.distcp").open("r+b") as file:
        file.write(b"X")
    assert_said({"proof": check_undamaged}, tmp_path / "made", "__0_0.distcp is not what was verified")


def test_a_checkpoint_of_megatron_without_its_config(tmp_path: Path) -> None:
    parent = megatron(tmp_path, "iter_0000010")
    (parent / "iter_0000010/config.json").unlink()
    (parent / "latest_checkpointed_iteration.txt").write_text("10")
    for place in (parent, parent / "iter_0000010"):
        assert_said(
            CHECKPOINT, place, "iter_0000010 is a Megatron checkpoint without config.json", "cp MODEL/config.json"
        )


def test_other_formats_of_megatron(tmp_path: Path) -> None:
    ranks = tmp_path / "old/iter_0000500/mp_rank_00_000"
    ranks.mkdir(parents=True)
    (ranks / "model_optim_rng.pt").write_bytes(b"PK")
    (tmp_path / "old/latest_checkpointed_iteration.txt").write_text("500")
    for place in (tmp_path / "old", ranks.parent, ranks):
        assert_said(ALL, place, "legacy format (mp_rank_*)", "--ckpt-convert-format torch_dist --ckpt-convert-save")
    (tmp_path / "old/latest_checkpointed_iteration.txt").unlink()
    (tmp_path / "old/config.json").write_text("{}")
    assert_said(CHECKPOINT | FOLDER, tmp_path / "old", "legacy format (mp_rank_*)")
    assert_said(CHECKPOINT, ranks / "model_optim_rng.pt", "legacy format (mp_rank_*)")
    other = tmp_path / "dcp"
    other.mkdir()
    (other / ".metadata").write_bytes(b"")
    assert_said(ALL, other, "without metadata.json", "--ckpt-format torch_dist")


def test_a_folder_of_megatron_with_a_release_alone_or_with_the_config_outside(tmp_path: Path) -> None:
    parent = megatron(tmp_path, "release")
    assert_said(ALL, parent, "without latest_checkpointed_iteration.txt", f"give one of those there, such as {parent}")
    (parent / "release/config.json").rename(parent / "config.json")
    assert_said(CHECKPOINT | FOLDER, parent, "without latest_checkpointed_iteration.txt", str(parent / "release"))
    (parent / "latest_checkpointed_iteration.txt").write_text("release")
    assert_said(CHECKPOINT, parent, "release is a Megatron checkpoint without config.json")
    assert_said(CHECKPOINT, parent / "config.json", f"give the folder, {parent}")
    (parent / "release/.metadata").write_text(POINTER)
    assert_said(CHECKPOINT, parent, ".metadata is a Git LFS pointer")


def test_other_folders_and_files_are_told_as_before(tmp_path: Path) -> None:
    assert_said(CHECKPOINT, tmp_path, "is no checkpoint: it has neither config.json")
    assert_said({"run": at_start}, tmp_path, f"{tmp_path} has no config.json")
    assert_said(RUN, tmp_path, f"{tmp_path} is not a finished model of a run: give one")
    assert re.search(r"there is no .*nothing", str(folder_problem(tmp_path / "nothing", sampled=False)))
