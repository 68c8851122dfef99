"""Transformer Engine's own Python on a CPU: stand-ins of its compiled part, and of what else it wants at its import.

The package `transformer_engine` is Python alone; its compiled part is the module `transformer_engine_torch`. With a
stand-in of that, its layers can be built, saved and loaded as they are. A function of the compiled part that has no
stand-in raises NotImplementedError when it is called.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import unwrap
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import MagicMock, patch

import torch
import torch._dynamo  # Transformer Engine imports it; it stumbles over stand-ins of packages

from srlm_mega.tools.rehearsal.engine_kernels import STAND_INS

COMPILED = "transformer_engine_torch"
# Imported by Transformer Engine, used by its export to ONNX and by its inference only.
UNUSED_PACKAGES = ("onnx", "onnxscript", "einops")
CUDNN, CUDA = 91500, "13.0"  # an image of late 2025; older ones are refused at the import, or for some recipe
# In the compiled part's order, since they are indices of scales.
FORWARD_TENSORS = [f"GEMM{number}_{which}" for number in (1, 2, 3) for which in ("INPUT", "WEIGHT", "OUTPUT")]
BACKWARD_TENSORS = [f"GRAD_{which}{number}" for number in (1, 2, 3) for which in ("OUTPUT", "INPUT")]


class Enumeration(type):
    """A class of numbers. Any attribute is a member of it, numbered in the order in which they are first read."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":
            return {key: value for key, value in vars(cls).items() if isinstance(value, cls)}
        if name.startswith("__"):
            raise AttributeError(name)
        member = cls(len(cls.__members__))
        setattr(cls, name, member)
        return member


class CompiledPart(ModuleType):
    """The stand-in of `transformer_engine_torch`: enumerations by any name, and functions that say what is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = Enumeration(name, (int,), {}) if name[0].isupper() else missing(name)
        setattr(self, name, made)
        return made


def missing(name: str) -> Any:
    """Return a function that raises NotImplementedError."""

    def function(*arguments: Any, **settings: Any) -> NoReturn:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in here: run this on a GPU")

    return function


def import_engine(capability: tuple[int, int]) -> CompiledPart:
    """Import transformer_engine.pytorch for a GPU of this compute capability, and return its compiled part's stand-in.

    Call it before Megatron is imported. It lasts for the rest of this process: for `torch.cuda`'s questions about the
    device too. ImportError when the package `transformer_engine` is not installed.
    """
    device = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132, name="stand-in")
    torch.cuda.get_device_properties = lambda device_=None: device
    torch.cuda.get_device_capability = lambda device_=None: capability
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device, torch.cuda.nvtx = nullcontext, MagicMock()
    torch.Tensor.cuda = lambda self: self
    torch.version.cuda = CUDA
    compiled = CompiledPart(COMPILED)
    for enumeration, names in (("FP8FwdTensors", FORWARD_TENSORS), ("FP8BwdTensors", BACKWARD_TENSORS)):
        for name in names:
            getattr(getattr(compiled, enumeration), name)
    vars(compiled).update(STAND_INS, get_cudnn_version=lambda: CUDNN)
    sys.modules[COMPILED] = compiled
    unused = [name for name in UNUSED_PACKAGES if find_spec(name) is None]
    sys.modules |= {name: MagicMock() for name in unused}
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # without it the import looks for CUDA's libraries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package tries `pytorch` by itself, and warns that it finds no library
        vars(import_module("transformer_engine.common"))["load_framework_extension"] = lambda framework: None
    import_module("transformer_engine.pytorch")
    # It has the names that the compiled part had at its import; the others are looked up.
    vars(import_module("transformer_engine.pytorch.cpp_extensions"))["__getattr__"] = partial(getattr, compiled)
    for name in unused:
        del sys.modules[name]
    attention = import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    choose = attention.get_attention_backend
    # It takes tensors by their very type, which is another for those without contents.
    vars(attention)["get_attention_backend"] = lambda asked: choose(replace(asked, qkv_type=torch.Tensor))
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.pytorch"):
            put_on_cpu(module)
    return compiled


def put_on_cpu(module: ModuleType) -> None:
    """Let the functions and methods of a module allocate on the CPU where they say "cuda"."""
    classes = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    for item in [*vars(module).values(), *(member for one in classes for member in vars(one).values())]:
        function = unwrap(getattr(item, "__func__", item)) if callable(item) else None
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            function.__code__ = on_cpu(function.__code__)


def on_cpu(code: CodeType) -> CodeType:
    """Return code with "cpu" for "cuda", in the functions inside it too; unchanged where it numbers the device."""
    if "current_device" in code.co_names:
        return code
    replaced = [on_cpu(one) if isinstance(one, CodeType) else "cpu" if one == "cuda" else one for one in code.co_consts]
    return code.replace(co_consts=tuple(replaced))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let models be built in the block where Transformer Engine was imported on stand-ins: its modules ask for CUDA,
    and Megatron asks older versions, for any kind of layers, for what makes streams."""
    stand_ins = isinstance(sys.modules.get(COMPILED), CompiledPart)
    with patch.multiple(torch.cuda, is_available=lambda: True, Stream=MagicMock()) if stand_ins else nullcontext():
        yield
