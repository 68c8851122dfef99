"""How errors of checkpoints read. Saving and resuming itself is in test_resume.py and test_layer_te.py."""

from pickle import UnpicklingError

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.training.checkpoint import explained, unwritten


@pytest.mark.parametrize("rank", [0, 1])
def test_what_torch_and_megatron_say_of_checkpoints_is_explained(rank: int) -> None:
    """torch's exception is no Exception, and only the first rank's holds the failures."""
    failures = {3: (OSError("No space left on device"), None)} if rank == 0 else {}
    with (
        pytest.raises(CannotContinue, match=r"iter_1 was not written \((No space left.*|rank 0 says why)\): make room"),
        explained(CannotContinue, "iter_1 was not written", "make room"),
    ):
        raise CheckpointException("write", failures)  # type: ignore[arg-type]
    with (
        pytest.raises(UserError, match=r"iter_1 does not fit \(Global shape mismatch\): resume elsewhere"),
        explained(UserError, "iter_1 does not fit", "resume elsewhere"),
    ):
        raise CheckpointingException("Global shape mismatch")


@pytest.mark.parametrize("size", [1, 400_000])
def test_a_common_file_that_cannot_be_written_is_no_crash(size: int) -> None:
    with (
        pytest.raises(CannotContinue, match=r"iter_1 was not written \(.*\): make room"),
        explained(CannotContinue, "iter_1 was not written", "make room"),
        unwritten(),
    ):
        torch.save({"a": torch.zeros(size)}, "/dev/full")
    with pytest.raises(RuntimeError, match="a bug"), unwritten():
        raise RuntimeError("a bug")


def test_an_object_that_would_run_something_is_explained_in_a_line() -> None:
    failures = {0: (UnpicklingError("Weights only load failed. Re-running `torch.load` with ...\n\n"), None)}
    with (
        pytest.raises(UserError, match=r"iter_1 does not fit \(a file is damaged, or asks for more .*\): remove it$"),
        explained(UserError, "iter_1 does not fit", "remove it"),
    ):
        raise CheckpointException("read", failures)  # type: ignore[arg-type]
