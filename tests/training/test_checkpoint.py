"""How errors of checkpoints read. Saving and resuming itself is in test_resume.py and test_layer_te.py."""

from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.training.checkpoint import Position, check_common, explained, unwritten


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


GROUP = {"is_expert_parallel": False, "default_config": True, "wd_mult": 1.0, "lr_mult": 1.0, "is_decoupled_lr": False}
GROUP |= {"max_lr": 0.003, "min_lr": 0.0003, "lr": 0.0026, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-08}
LIVE = [GROUP | {"wd_mult": wd_mult, "params": [0], "fused": None} for wd_mult in (1.0, 0.0)]


def saved(**changes: object) -> dict[str, object]:
    """An optimizer's common state, as a training writes it, with changes to one group."""
    return {"param_groups": [GROUP | {"step": 1} | changes, GROUP | {"step": 1, "wd_mult": 0.0}]}


def test_common_state_of_this_training_is_taken() -> None:
    """Of any optimizer, and with what another version or machine writes more, or less."""
    older = saved(fused=True, step=torch.tensor(1.0), more="x")
    del older["param_groups"][1]["max_lr"]  # type: ignore[index]
    for state in (saved(), older, {"optimizer": saved(), "param_state_sharding_type": "x"}, {0: saved(), 1: saved()}):
        check_common(Position(3, 4, 0), state, LIVE)
    check_common(Position(), {}, [])


HOSTILE: list[object] = [None, 5, [], {}, {"param_groups": 5}, {"param_groups": [5]}, {"param_groups": []}]
HOSTILE += [{"param_groups": [{}, {}]}, saved(lr="x"), saved(betas=5), saved(betas=(0.9,)), saved(betas=(0.9, "x"))]
HOSTILE += [saved(eps=float("nan")), saved(weight_decay=[]), saved(max_lr={}), saved(wd_mult=7.0), saved(step="x")]
HOSTILE += [{"param_groups": [GROUP]}, {"optimizer": saved(lr=True)}, saved(is_decoupled_lr=[1])]


@pytest.mark.parametrize("state", HOSTILE, ids=str)
def test_common_state_of_another_form_is_refused(state: object) -> None:
    """It ended in an error of any kind: in Megatron, or steps later."""
    with pytest.raises(ValueError, match="its optimizer"):
        check_common(Position(), state, LIVE)


@pytest.mark.parametrize("wrong", [{"step": "x"}, {"step": -1}, {"num_tokens": 1.5}, {"skipped_in_a_row": None}])
def test_a_position_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its position is"):
        check_common(Position(**wrong), saved(), LIVE)


def test_an_object_that_would_run_something_is_explained_in_a_line() -> None:
    failures = {0: (UnpicklingError("Weights only load failed. Re-running `torch.load` with ...\n\n"), None)}
    with (
        pytest.raises(UserError, match=r"iter_1 does not fit \(a file is damaged, or asks for more .*\): remove it$"),
        explained(UserError, "iter_1 does not fit", "remove it"),
    ):
        raise CheckpointException("read", failures)  # type: ignore[arg-type]
