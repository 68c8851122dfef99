"""srlm doctor in environments that are broken on purpose: fake packages before the real ones."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from engine_packages import ENDS, NEWEST
from places import CONFIGS, ROOT

from srlm_mega.cli.parts_in_use import parts_in_use, sampler_part
from srlm_mega.config.file import load_config
from srlm_mega.launch.doctor import (
    FILE,
    DoctorRow,
    Probed,
    VersionSet,
    best_fit,
    diagnose,
    fits,
    is_well,
    run_probe,
    version_set,
    version_sets,
)
from srlm_mega.launch.probe import ProbeAnswer
from srlm_mega.training.megatron_version import VERSIONS

TRAINING, SAMPLING, CPU = version_set("training"), version_set("sampling"), version_set("cpu")
TORCH = ProbeAnswer("2.10.0a0+b4e4ee81d3", cuda="13.1", triton='triton==3.6.0; platform_system == "Linux"')
WELL = {
    "python": ProbeAnswer("3.12.3"),
    "torch": TORCH,
    "cuda": ProbeAnswer("13.1", detail="8 devices"),
    "nccl": ProbeAnswer("2.28.9"),
    "megatron-core": ProbeAnswer("0.16.1"),
    "transformer-engine": ProbeAnswer("2.10.0"),
    "apex": ProbeAnswer("0.1"),
    "flash-attn": ProbeAnswer(absent=True),
    "triton": ProbeAnswer("3.6.0"),
    "tensorrt-llm": ProbeAnswer(absent=True),
    "vllm": ProbeAnswer(absent=True),
    "modelopt": ProbeAnswer("0.47.0"),
    "transformers": ProbeAnswer("5.23.0"),
    "slurm": ProbeAnswer("24.05.3", detail="controller is UP"),
}


def rows(
    chosen: VersionSet = TRAINING, under_slurm: bool = False, **changes: ProbeAnswer | str
) -> dict[str, DoctorRow]:
    """Of a well environment in which some probes (by name, _ for -) answer otherwise; a text is a failure."""
    probed = WELL | {name.replace("_", "-"): answer for name, answer in changes.items()}
    found = [
        Probed(name, None, answer) if isinstance(answer, str) else Probed(name, answer)
        for name, answer in probed.items()
    ]
    return {row.name: row for row in diagnose(found, chosen, under_slurm)}


def bad(chosen: VersionSet = TRAINING, under_slurm: bool = False, **changes: ProbeAnswer | str) -> DoctorRow:
    """The only red row."""
    (row,) = [row for row in rows(chosen, under_slurm, **changes).values() if row.status == "bad"]
    return row


def test_a_configuration_s_parts_are_told(tmp_path: Path) -> None:
    """Those of training by the trainer's own choice, the sampler's in the sampler's environment."""
    toy, here = CONFIGS / "toy_cpu.yaml", [Probed(name, ProbeAnswer(absent=True)) for name in ("tensorrt-llm", "vllm")]
    uses = {part.name: part for part in parts_in_use([str(toy)], load_config(toy).sampler, here, 60)}
    assert {part.use for part in uses.values()} == {"not used"}
    assert uses["vllm"].why == "sampler.backend=huggingface" and "CPU" in uses["apex"].why
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"version": "0.32.0"}'\n""")
    python.chmod(0o755)
    sampler = load_config(toy, ["sampler.backend=vllm", f"sampler.python={python}"]).sampler
    vllm = sampler_part(sampler, here[1], 60)
    assert vllm.use == "used" and f"0.32.0 in {python}" in vllm.why
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    broken = sampler_part(sampler, here[1], 60)
    assert broken.use == "refused" and "ended by SIGSEGV" in broken.why
    python.unlink()
    gone = sampler_part(sampler, here[1], 60)
    assert gone.use == "refused" and f"{python}: cannot be started (No such file or directory)" in gone.why
    own = load_config(toy, ["sampler.backend=vllm"]).sampler
    assert sampler_part(own, here[1], 0).use == "refused", "what this environment's probe found, and no further process"
    assert sampler_part(own, Probed("vllm", ProbeAnswer("0.32.0")), 0).use == "used"


def test_a_well_environment_is_well() -> None:
    found = rows()
    assert is_well(list(found.values())) and all(row.remedy == "" for row in found.values())
    assert found["flash-attn"].status == "absent" and found["tensorrt-llm"].status == "not asked"


@pytest.mark.parametrize(
    ("changes", "name", "found", "remedy"),
    [
        ({"cuda": "OSError: libcuda.so.1: cannot open shared object file"}, "cuda", "libcuda.so.1", "NVIDIA's driver"),
        ({"torch": ProbeAnswer("2.13.0+cpu", detail="CPU build")}, "torch", "CPU build", "CUDA build"),
        ({"cuda": ProbeAnswer("12.8")}, "cuda", "12.8", "driver up to date"),
        ({"megatron_core": ProbeAnswer("0.15.0")}, "megatron-core", "0.15.0", "megatron-core==0.16.1"),
        ({"megatron_core": ProbeAnswer(absent=True)}, "megatron-core", "absent", "megatron-core==0.16.1"),
        ({"apex": ProbeAnswer("0.9.10.dev0", stranger=True)}, "apex", "another project's", "pip uninstall apex"),
        ({"triton": ProbeAnswer("3.9.0")}, "triton", "3.9.0", "pip install 'triton==3.6.0'"),
        ({"modelopt": "ImportError: No module named 'requests'"}, "modelopt", "requests", "pip install requests"),
        ({"megatron_core": "ModuleNotFoundError: No module named 'megatron.core'"}, "megatron-core", "megatron.core",
         "pip install --no-deps megatron-core==0.16.1"),
        ({"flash_attn": "ImportError: x.so: undefined symbol: _ZN3c10"}, "flash-attn", "_ZN3c10", "does not fit this"),
        ({"transformer_engine": "ended by SIGSEGV"}, "transformer-engine", "SIGSEGV", "does not fit this torch"),
        ({"transformers": "no answer in 120 s"}, "transformers", "no answer", "faulthandler -c 'import transformers'"),
        ({"python": ProbeAnswer("3.10.1")}, "python", "3.10.1", "Python >=3.11"),
    ],
)  # fmt: skip
def test_the_red_row_and_its_remedy(changes: dict[str, ProbeAnswer | str], name: str, found: str, remedy: str) -> None:
    row = bad(**changes)
    assert row.name == name and found in row.found and remedy in row.remedy


def test_what_is_needed_depends_on_the_purpose() -> None:
    laptop = {"cuda": "OSError: libcuda.so.1", "torch": ProbeAnswer("2.13.0+cpu"), "nccl": ProbeAnswer(absent=True)}
    assert is_well(list(rows(CPU, triton=ProbeAnswer("3.9.0"), **laptop).values()))
    assert bad(CPU, torch=ProbeAnswer(absent=True)).name == "torch"
    missing = [row.name for row in rows(SAMPLING).values() if row.status == "bad"]
    assert missing == ["torch", "tensorrt-llm", "transformers"], "the trainer's environment is not the sampler's"


@pytest.mark.parametrize(
    ("here", "chosen"),
    [
        ({"tensorrt-llm": ProbeAnswer("1.2.1"), "torch": ProbeAnswer("2.9.1", cuda="13.0")}, "sampling"),
        (
            {
                "vllm": ProbeAnswer("0.32.0"),
                "torch": ProbeAnswer("2.13.0", cuda="13.0"),
                "transformers": ProbeAnswer("5.18.0"),
            },
            "sampling_vllm",
        ),
        ({"tensorrt-llm": ProbeAnswer("1.4.0rc4"), "torch": ProbeAnswer("2.12.0", cuda="13.0")}, "sampling_trtllm_1_4"),
        (
            {"vllm": ProbeAnswer("0.32.0"), "torch": ProbeAnswer("2.13.0+cpu"), "cuda": None, "nccl": None},
            "sampling_vllm_cpu",
        ),
    ],
)
def test_the_set_of_the_sampler_that_is_here(here: dict[str, ProbeAnswer | None], chosen: str) -> None:
    probed = [
        Probed(name, answer, "OSError: libcuda.so.1" if answer is None else "")
        for name, answer in (WELL | here).items()
    ]
    assert best_fit(probed, version_sets("sampling", None), False)[0].name == chosen
    names = {one.name for one in version_sets("sampling", "vllm")}
    assert names == {"sampling_vllm", "sampling_vllm_cpu"}
    versions, rows = best_fit(probed, version_sets("sampling", "vllm"), False)
    wrong = {row.name for row in rows if row.status == "bad"}
    assert versions.name in names and ("vllm" in wrong) == ("vllm" not in chosen), "the backend that was asked for"


@pytest.mark.parametrize(
    ("python", "megatron_core", "engine", "chosen", "wrong"),
    [
        ("3.12.3", "0.16.1", "2.10.0", "", []),
        ("3.12.3", "0.19.2", "2.20.2", "_megatron_0_19", []),
        ("3.12.3", "0.19.2", None, "_megatron_0_19", []),
        ("3.12.3", None, "2.10.0", "", ["megatron-core"]),
        ("3.12.3", "0.18.0", "2.10.0", "", ["megatron-core"]),
        ("3.11.9", "0.19.2", "2.10.0", "", ["megatron-core"]),  # pip cannot have put it there
    ],
)
def test_the_set_of_the_megatron_core_that_is_here(
    python: str, megatron_core: str | None, engine: str | None, chosen: str, wrong: list[str]
) -> None:
    here = {"python": python, "megatron-core": megatron_core, "transformer-engine": engine}
    answers = {name: ProbeAnswer(version or "", absent=version is None) for name, version in here.items()}
    probed = [Probed(name, answer) for name, answer in (WELL | answers).items()]
    versions, rows = best_fit(probed, version_sets("training", None), False)
    assert versions.name == f"training{chosen}"
    assert [row.name for row in rows if row.status == "bad"] == wrong
    assert not wrong or "megatron-core==0.16.1" in next(row.remedy for row in rows if row.status == "bad")
    cpu = [Probed(name, answer) for name, answer in (WELL | answers | {"torch": ProbeAnswer("2.13.0+cpu")}).items()]
    assert best_fit(cpu, version_sets("cpu", None), False)[0].name == f"cpu{chosen}"


def test_every_megatron_core_of_training_has_its_sets() -> None:
    for purpose in ("cpu", "training"):
        needed = [one.packages["megatron-core"].needs for one in version_sets(purpose, None)]
        assert needed == [f"=={version}" for version in VERSIONS]


def test_an_untested_version_is_yellow_and_no_failure() -> None:
    found = rows(torch=ProbeAnswer("2.12.0", cuda="13.0"))
    assert found["torch"].status == "untested" and "may work" in found["torch"].remedy
    assert is_well(list(found.values()))


@pytest.mark.parametrize(
    "answer", [ProbeAnswer(absent=True), ProbeAnswer("24.05", detail="no controller answers"), "no answer in 9 s"]
)
def test_slurm_where_jobs_are_to_run_under_it(answer: ProbeAnswer | str) -> None:
    assert "scontrol ping" in bad(under_slurm=True, slurm=answer).remedy
    if isinstance(answer, ProbeAnswer):
        assert is_well(list(rows(slurm=answer).values()))


def fake(folder: Path, name: str, version: str, code: str = "", requires: str = "", module: str = "") -> None:
    """A distribution, and its module (by default of the same name), whose first package's code is this."""
    inner = folder.joinpath(*(module or name).split("."))
    inner.mkdir(parents=True)
    for package in (inner, *inner.parents):
        if package == folder:
            break
        (package / "__init__.py").write_text(code + "\n")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *([f"Requires-Dist: {requires}"] if requires else []), ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes before the real ones."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def probed(name: str, seconds: float = 60) -> DoctorRow:
    """The row of a part as it is found here, for training."""
    return {row.name: row for row in diagnose([run_probe(name, seconds)], TRAINING, False)}[name]


def test_a_probe_that_is_none_is_named() -> None:
    assert run_probe("pytorch", 60).failure.startswith("ValueError: no probe 'pytorch': there are python, torch, cuda")


def test_the_apex_of_pypi(site: Path) -> None:
    """It is told by what it asks for; importing it fails in another package."""
    fake(
        site,
        "apex",
        "0.9.10.dev0",
        "from pyramid.session import UnencryptedCookieSessionFactoryConfig",
        "pyramid>1.1.2",
    )
    row = probed("apex")
    assert (row.status, row.found) == ("bad", "0.9.10.dev0, another project's") and "pip uninstall apex" in row.remedy


def test_the_apex_of_nvidia(site: Path) -> None:
    fake(site, "apex", "0.1", "", "packaging>20.6")
    assert probed("apex").status == "ok"


def test_a_package_that_misses_libcuda(site: Path) -> None:
    fake(site, "flash_attn", "2.8.3", "raise ImportError('libcuda.so.1: cannot open shared object file')")
    row = probed("flash-attn")
    assert row.status == "bad" and "libcuda.so.1" in row.found and "comes with NVIDIA's driver" in row.remedy


def test_a_driver_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    row = probed("cuda")
    assert row.status == "bad" and "libcuda.so.1" in row.found and "docker run --gpus all" in row.remedy


def test_an_import_that_hangs_is_a_red_row(site: Path) -> None:
    fake(site, "flash_attn", "2.8.3", "import time\ntime.sleep(600)")
    row = probed("flash-attn", seconds=1)
    assert (row.status, row.found) == ("bad", "no answer in 1 s") and "faulthandler" in row.remedy


def test_an_import_that_crashes_is_a_red_row(site: Path) -> None:
    fake(site, "flash_attn", "2.8.3", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    row = probed("flash-attn")
    assert (row.status, row.found) == ("bad", "ended by SIGSEGV") and "does not fit" in row.remedy


FAKE_TORCH = """
import types
class ones:
    def __init__(self, *shape): pass
    def __matmul__(self, other): return self
    def sum(self): return 8.0
version = types.SimpleNamespace(cuda="13.0")
distributed = types.SimpleNamespace(is_nccl_available=lambda: True)
cuda = types.SimpleNamespace(nccl=types.SimpleNamespace(version=lambda: (2, 28, 9)))
"""


def fake_environment(site: Path) -> None:
    """Everything that training needs, but for a driver and a slurm; triton is not what torch asks for."""
    fake(site, "torch", "2.11.0", FAKE_TORCH, "triton==3.6.0; sys_platform == 'linux'")
    for name, module, version in (
        ("megatron_core", "megatron.core", "0.16.1"), ("transformer_engine", "transformer_engine.pytorch", "2.10.0"),
        ("triton", "triton.language", "3.9.0"), ("flash_attn", "flash_attn", "2.8.3"), ("apex", "apex", "0.1"),
        ("transformers", "transformers.models.llama.modeling_llama", "5.23.0"),
        ("nvidia_modelopt", "modelopt.torch.quantization", "0.47.0"),
    ):  # fmt: skip
        fake(site, name, version, module=module)


def test_the_command_with_a_mismatched_triton_and_no_driver(site: Path, tmp_path: Path, srlm: Path) -> None:
    fake_environment(site)
    (tmp_path / "libcuda.so.1").write_text("not a library")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    argv = [str(srlm), "doctor", "--for", "training"]
    done = subprocess.run([*argv, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    table = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert {name for name, row in table.items() if row["status"] == "bad"} == {"cuda", "triton"}
    assert table["triton"]["wanted"] == "==3.6.0, by torch 2.11.0"
    assert table["triton"]["remedy"] == "pip install 'triton==3.6.0'"
    assert table["torch"]["found"] == "2.11.0 (CUDA 13.0)" and table["nccl"]["found"] == "2.28.9"

    (site / "triton-3.9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6.0\n")
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "triton" in done.stdout and "pip install 'triton" not in done.stdout
    assert "cuda: libcuda.so.1 comes with NVIDIA's driver" in " ".join(done.stdout.split())


@pytest.mark.extra
def test_this_environment_is_one_that_was_tested(srlm: Path) -> None:
    done = subprocess.run([str(srlm), "doctor", "--for", "cpu", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    status = {row["name"]: row["status"] for row in json.loads(done.stdout)["rows"]}
    assert status["torch"] == status["megatron-core"] == status["transformers"] == "ok"


def test_versions_as_pip_reads_them() -> None:
    assert fits("2.10.0a0+b4e4ee81d3.nv25.12", "==2.10.*") and fits("2.13.0+cpu", "==2.13.0") and fits("1", "")
    assert not fits("0.16.2", "==0.16.1")


def pins() -> dict[str, str]:
    """constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_cpu_set_is_constraints_txt() -> None:
    for name, package in CPU.packages.items():
        pin = pins().get("nvidia-modelopt" if name == "modelopt" else name)
        assert package.tested == (f"=={pin}" if pin else ""), name
        assert pin is None or f"=={pin}" in package.install, name


def test_what_is_tested_is_within_what_is_needed() -> None:
    for purpose in tomllib.loads(FILE.read_text()):
        for name, package in version_set(purpose).packages.items():
            for version in re.findall(r"^==([\d.]+)$", package.tested):
                assert fits(version, package.needs), (purpose, name)


def test_each_line_of_tensorrt_llm_has_a_set_of_its_own() -> None:
    sets = {name: version_set(name).packages["tensorrt-llm"] for name in ("sampling", "sampling_trtllm_1_4")}
    fitting = {
        version: [name for name, package in sets.items() if fits(version, package.needs)]
        for version in ("1.2.1", "1.3.0rc24", "1.3.0rc26", "1.4.0rc4")
    }
    assert fitting == {
        "1.2.1": ["sampling"],
        "1.3.0rc24": [],
        "1.3.0rc26": ["sampling_trtllm_1_4"],
        "1.4.0rc4": ["sampling_trtllm_1_4"],
    }
    assert fits("1.4.0rc4", sets["sampling_trtllm_1_4"].tested)
    assert "trtllm_engine ends" in version_set("sampling").source


@pytest.mark.parametrize("purpose", ["cpu", "training"])
def test_what_is_needed_is_what_pip_would_ask_for(purpose: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("torch", "megatron-core", "transformers"):
        assert f"{name}{version_set(purpose).packages[name].needs}" in project["dependencies"]


def test_one_range_of_transformer_engine() -> None:
    """What pip takes, what the doctor takes, what both say to install, and the ends of what the tests run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    package = TRAINING.packages["transformer-engine"]
    asked = f"transformer-engine[pytorch]{package.needs}"
    assert asked in project["optional-dependencies"]["gpu"]
    assert f"'{asked}'" in package.install and f"'{asked}'" in (ROOT / "docs/cluster.md").read_text()
    assert [fits(version, package.needs) for version in ("2.8.0", *ENDS, "2.12.0", NEWEST)] == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("file", "purpose"), [("training", "training"), ("sampler", "sampling"), ("vllm", "sampling_vllm")]
)
def test_the_dockerfiles_are_built_on_the_table(file: str, purpose: str) -> None:
    text = (ROOT / "launch" / "containers" / f"{file}.Dockerfile").read_text()
    chosen = version_set(purpose)
    assert re.findall(r"^FROM (.+)$", text, re.MULTILINE) == [chosen.image]
    for name, version in re.findall(r"([\w-]+)==([\w.]+)", text):
        assert chosen.packages[name].tested == f"=={version}", name
    assert "pip install --no-cache-dir --no-deps /opt/srlm-mega" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[=<>]", line)[0] for line in project["dependencies"]} - {"torch"}
    if purpose == "training":
        assert asked <= set(re.findall(r"[\w-]+", text)), "what pip would install is named, all but torch"
    else:
        guide = (ROOT / "docs" / "sampling.md").read_text()
        (light,) = re.findall(r"^pip install (jinja2 .+)$", guide, re.MULTILINE)
        assert f"pip install --no-cache-dir {light}" in text, "the same as docs/sampling.md's"


def test_the_dockerfiles_copy_the_whole_package() -> None:
    for file in ("training", "sampler", "vllm"):
        text = (ROOT / "launch" / "containers" / f"{file}.Dockerfile").read_text()
        for link in (path for path in (ROOT / "srlm_mega").iterdir() if path.is_symlink()):
            assert f"COPY {link.name} /opt/srlm-mega/{link.name}" in text
