"""What torch.compile does in the trainer's processes."""

import torch


def compile_on_gpus_only() -> None:
    """To be called before megatron-core is imported: its decorators call torch.compile there and then, and to load the
    default backend, inductor, is a quarter of a process's start. On a CPU none of those functions is ever called."""
    if not torch.cuda.is_available():
        torch.compiler.set_default_backend("eager")
