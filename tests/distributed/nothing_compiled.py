"""Imported before megatron-core: to compile anything on a CPU is an error from then on, since the trainer compiles
nothing there (`joined_ranks`), and processes start sooner."""

import torch


def refuse(graph: object, inputs: object) -> None:
    raise AssertionError("the trainer compiled something on a CPU")


torch.compiler.set_default_backend(refuse)
