"""Imported before megatron-core: to compile anything on a CPU is an error from then on (training/compiling.py says that
nothing is), and processes start sooner."""

import torch


def refuse(graph: object, inputs: object) -> None:
    raise AssertionError("the trainer compiled something on a CPU")


torch.compiler.set_default_backend(refuse)
