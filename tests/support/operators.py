"""The operators of PyTorch that are called."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READ = "_local_scalar_dense"  # a tensor's value taken to the host: `item`, `tolist`, `if`


class Operators(TorchDispatchMode):
    """Notes the names of all operators in its block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator's name and run it."""
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
