"""An installed srlm has everything that a checkout has: the wheel, and the sdist a wheel can be built from."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Set
from pathlib import Path

import pytest
from fake_run import make_run
from places import ROOT

LINKED = ("kernels", "launch", "tools", "checkpoints_conversion")
SCRIPTS = "tools/scripts/"  # run in a checkout, no part of the wheel


def tracked() -> list[str]:
    """Files of the working tree that git knows, links among them."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def package_files() -> set[str]:
    """Where each tracked file of the package is once installed; the four links are folders there."""
    files = {name for name in tracked() if name.startswith("srlm_mega/") and not (ROOT / name).is_symlink()}
    linked = {name for name in tracked() if name.startswith(tuple(f"{folder}/" for folder in LINKED))}
    return files | {f"srlm_mega/{name}" for name in linked if not name.startswith(SCRIPTS)}


def build(kind: str, project: Path, folder: Path) -> Path:
    """The wheel or sdist of a project, made without network."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=project, capture_output=True, check=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, with the compiled modules of an earlier start beside them and nothing else."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("srlm_mega", "kernels"):
        (folder / name / "__pycache__").mkdir(parents=True)
        (folder / name / "__pycache__" / "module.cpython-311.pyc").touch()
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build("wheel", checkout, checkout.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    return build("sdist", checkout, checkout.parent / "sdist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into, with its `srlm` in bin/."""
    folder = tmp_path_factory.mktemp("installed")
    argv = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(argv, capture_output=True, check=True)
    return folder


def in_empty_folder(installed: Path, folder: Path, *argv: str) -> str:
    """What an installed command prints in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # beside the script there is no Python
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(archive: Path) -> dict[str, bytes]:
    """A wheel's files."""
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def without_metadata(names: Set[str]) -> set[str]:
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    (script,) = {name for name in contents(wheel) if name.endswith(".data/scripts/srlm")}
    assert without_metadata(contents(wheel).keys()) - {script} == package_files()


def test_the_sdist_has_every_file_of_the_package_and_links_followed(sdist: Path) -> None:
    with tarfile.open(sdist) as opened:
        names = {member.name.partition("/")[2]: member for member in opened.getmembers()}
    assert {
        name for name, member in names.items() if name.startswith("srlm_mega/") and member.isfile()
    } == package_files()
    assert not any(member.issym() for member in names.values())
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names.keys()


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    (project,) = tmp_path.iterdir()
    assert contents(build("wheel", project, tmp_path / "again")) == contents(wheel)


def test_a_preset_is_known_by_its_name(installed: Path, tmp_path: Path) -> None:
    where = in_empty_folder(installed, tmp_path, sys.executable, "-c", "import srlm_mega; print(srlm_mega.__file__)")
    assert Path(where.strip()) == installed / "srlm_mega/__init__.py"
    said = in_empty_folder(installed, tmp_path, str(installed / "bin/srlm"), "config", "show", "toy_cpu")
    assert "# toy_cpu.yaml" in said


def test_the_report_has_its_style_and_script(installed: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    in_empty_folder(installed, tmp_path, str(installed / "bin/srlm"), "report", str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ("report.css", "report.js"):
        assert (ROOT / "srlm_mega/report" / name).read_text(encoding="utf-8") in page
