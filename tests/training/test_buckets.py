"""Gradients are reduced in buckets on every pipeline stage, so that the overlap hides messages on all of them."""

from collections.abc import Iterator
from functools import partial

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from tiny_llama import SHAPE, training_config
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from srlm_mega.training import model
from srlm_mega.training.model import build_model, transformer_config, wrap_data_parallel
from srlm_mega.training.topology import Topology

BUCKET = 5000  # parameters


@pytest.fixture(params=[0, 2], ids=["first stage", "last stage"])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A rank of four that do not exist: its messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


def buckets(overlap: bool, vpp: int | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of buckets of each of this rank's model chunks, of two stages and two replicas."""
    settings = training_config(
        4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=vpp,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
    )
    small = partial(DistributedDataParallelConfig, bucket_size=BUCKET)
    monkeypatch.setattr(model, "DistributedDataParallelConfig", small)
    with Topology.start(settings.parallel, settings.trainer, seed=0) as topology:
        llama = transformer_config(SHAPE, settings.sft, settings, topology)
        wrapped = wrap_data_parallel(build_model(llama, SHAPE, topology), llama, topology)
        assert [chunk.pp_group.rank() for chunk in wrapped] == [topology.pp_rank] * len(wrapped)
        return [len(chunk.bucket_groups) for chunk in wrapped]


@pytest.mark.parametrize(("vpp", "count"), [(None, [3]), (2, [2, 2])])
def test_every_stage_has_buckets(rank: int, vpp: int | None, count: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers with the embeddings or the head, or of one layer with or without them in each of two chunks. The
    matrices of a layer have 4608, 2048, 1024: a bucket ends with the one that fills it."""
    assert buckets(True, vpp, monkeypatch) == count


def test_without_overlap_there_is_one(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert buckets(False, None, monkeypatch) == [1]
