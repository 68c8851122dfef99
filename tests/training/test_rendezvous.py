"""Ranks that do not come to the start are named by those that did."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from srlm_mega.errors import StageCrashed
from srlm_mega.training.rendezvous import key, wait_for_all


def test_who_did_not_come_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    store = HashStore()
    for rank in (0, 2):
        store.set(key(rank), f"host{rank}")
    with pytest.raises(StageCrashed) as crashed:
        wait_for_all(store, 4, 0.3)
    assert str(crashed.value) == (
        "ranks did not start in 0.005 min. Did not arrive: rank 1, rank 3. Arrived: rank 0 on host0, rank 2 on host2"
    )
    assert "in wait_for_all" in capfd.readouterr().err


@pytest.mark.timing
def test_when_all_come_it_goes_on() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    other = TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=60))
    store.set(key(0), "here")
    late = threading.Timer(0.2, other.set, (key(1), "there"))
    late.start()
    wait_for_all(store, 2, 60)
    late.join()
