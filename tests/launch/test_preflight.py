"""Preflight's checks, each seen to find what it is for and to be silent without it."""

import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import pytest
from places import ROOT
from rich.console import Console

from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes
from srlm_mega.cli.doctor import model_folders
from srlm_mega.config.file import load_config
from srlm_mega.config.launch import PreflightConfig
from srlm_mega.config.model_sizes import ModelSizes
from srlm_mega.errors import UserError
from srlm_mega.launch.preflight import coordinator
from srlm_mega.launch.preflight.allreduce import (
    END,
    GroupSpeed,
    RankPlace,
    RanksOutcome,
    check_ranks,
    check_speeds,
    run_ranks,
)
from srlm_mega.launch.preflight.disk_need import DiskNeed, disk_need
from srlm_mega.launch.preflight.findings import Finding, check_absent, to_leave_out
from srlm_mega.launch.preflight.findings import findings as all_findings
from srlm_mega.launch.preflight.node_report import (
    InstalledGpu,
    NodeReport,
    TimedCheck,
    free_bytes,
    is_own,
    local_report,
    parse_nvidia_smi,
)
from srlm_mega.launch.preflight.this_node import expand, this_node

TOY = ROOT / "launch/configs/toy_cpu.yaml"
GIB = 1 << 30
H200 = InstalledGpu("NVIDIA H200", 0)
WELL = NodeReport("", 0, {"torch": "2.13.0", "driver": "580.1"}, (H200,) * 8, ("10.0.0.1",), free_bytes=900 * GIB)
NODES = tuple(replace(WELL, node=f"n{rank}", rank=rank, network=f"machine {rank}") for rank in range(4))
NEED = DiskNeed(parameters=100 * GIB, bf16=True, exports=4, kept_checkpoints=-1, sampled_tokens=0)  # 800 GiB


def findings(nodes: Sequence[NodeReport]) -> list[Finding]:
    """Of nodes that should have 8 GPUs, 800 GiB of free disk and clocks within 5 s."""
    return all_findings(nodes, 8, NEED, 5.0)


def changed(rank: int, **changes: object) -> list[Finding]:
    """Findings when one of four nodes is otherwise."""
    nodes = list(NODES)
    nodes[rank] = replace(nodes[rank], **changes)  # type: ignore[arg-type]
    return findings(nodes)


def test_well_nodes_are_well() -> None:
    assert findings(NODES) == []


@pytest.mark.parametrize(
    ("changes", "check", "got", "wanted", "remedy"),
    [
        ({"versions": {"torch": "2.12.1", "driver": "580.1"}}, "versions", "torch 2.12.1",
         "torch 2.13.0, as on 3 of 4 nodes", "environment"),
        ({"versions": {"driver": "580.1"}}, "versions", "torch absent", "torch 2.13.0", "environment"),
        ({"gpus": (H200,) * 7}, "GPUs", "7", "8, one for each of launch.processes_per_node", "processes_per_node"),
        ({"gpus": (*(H200,) * 7, InstalledGpu("NVIDIA H200", 3))}, "ECC", "3 uncorrected errors on GPU 7", "0",
         "reset"),
        ({"addresses": ()}, "host name", "does not resolve", "its own address", "/etc/hosts"),
        ({"addresses": ("10.9.9.9",), "foreign_addresses": ("10.9.9.9",)}, "host name", "an address of another",
         "its own address", "DNS"),
        ({"addresses": ("127.0.1.1",)}, "host name", "127.0.1.1, which no other node", "its own", "/etc/hosts"),
        ({"sees_head": False}, "shared folder", "it does not see what node 0 wrote", "one folder", "Mount"),
        ({"head_sees": False}, "shared folder", "node 0 does not see what it wrote", "one folder", "Mount"),
        ({"clock_ahead": 30.0, "clock_error": 0.1}, "clock", "30.0 s ahead of the others", "within 5 s", "chrony"),
        ({"clock_ahead": -30.0}, "clock", "30.0 s behind the others", "within 5 s", "chrony"),
        ({"open_files": 519}, "ulimit -n", "519", "520: 512, and 8 for", "LimitNOFILE"),
        ({"infiniband": True, "locked_bytes": 65_536}, "ulimit -l", "64 KiB", "at least 1 GiB", "LimitMEMLOCK"),
        ({"unanswered": {"GPUs": "no answer in 10 s"}, "gpus": None}, "GPUs", "no answer in", "an answer", "Log in"),
    ],
)  # fmt: skip
def test_a_finding_names_node_check_got_wanted_and_remedy(
    changes: dict[str, object], check: str, got: str, wanted: str, remedy: str
) -> None:
    (finding,) = changed(2, **changes)
    assert (finding.node, finding.check, finding.blamed) == ("n2", check, ("n2",))
    assert got in finding.got and wanted in finding.wanted and remedy in finding.remedy
    assert str(finding).startswith(f"n2: {check}: got {finding.got}, wanted {finding.wanted}. ")


def test_limits_that_are_enough() -> None:
    """Locked memory matters to RDMA alone; the number of ranks to connections."""
    assert changed(2, open_files=520, locked_bytes=65_536) == [] and changed(2, infiniband=True) == []
    assert changed(2, infiniband=True, locked_bytes=1 << 30) == []
    tight = [replace(node, infiniband=True, locked_bytes=65_536) for node in NODES]
    assert all_findings(tight, None, NEED, 5.0) == [], "ranks on CPUs talk over TCP"
    assert all_findings(tight[:1], 8, NEED, 5.0) == [], "on one node, over NVLink and shared memory"
    soft = [replace(node, open_files=1024) for node in NODES]
    assert all_findings(soft, 8, NEED, 5.0, ranks=64) == []
    assert [one.node for one in all_findings(soft, 8, NEED, 5.0, ranks=65)] == ["n0", "n1", "n2", "n3"]


def test_the_limits_of_this_process_are_reported(tmp_path: Path) -> None:
    report = local_report("n", 0, tmp_path, False, 10)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert report.open_files == (None if soft == resource.RLIM_INFINITY else soft) and report.unanswered == {}


def test_an_interface_that_a_node_lacks_is_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRLM_NETWORK_INTERFACES", "ib77 ib78")
    report = local_report("n", 0, tmp_path, False, 10)
    assert "no interface ib77 or ib78" in (report.unanswered or {})["network interface"]


def test_a_full_disk_is_nobodys_fault() -> None:
    (finding,) = changed(1, free_bytes=799 * GIB)
    assert str(finding).startswith(f"n1: free disk: got 799.0 GiB free, wanted 800.0 GiB ({NEED}). Free some space")
    assert finding.blamed == ()


def test_node_0_may_be_the_one_whose_clock_is_wrong() -> None:
    late = [NODES[0], *(replace(node, clock_ahead=60.0) for node in NODES[1:])]
    (finding,) = findings(late)
    assert (finding.node, finding.got) == ("n0", "60.0 s behind the others")


def test_a_clock_within_the_error_of_its_measurement_passes() -> None:
    assert changed(2, clock_ahead=8.0, clock_error=4.0) == []


def test_of_two_nodes_none_is_blamed_for_a_difference() -> None:
    other = replace(NODES[1], versions={"torch": "2.12.1", "driver": "580.1"}, clock_ahead=9.0)
    versions, clock = findings([NODES[0], other])
    assert versions.node == "n0, n1" and versions.got == "torch 2.13.0 on n0; torch 2.12.1 on n1"
    assert clock.got == "9.0 s ahead of node 0"
    assert versions.blamed == clock.blamed == ()


def test_no_shared_file_system_at_all_is_said_of_all_and_blamed_on_none() -> None:
    blind = [NODES[0], *(replace(node, sees_head=False, head_sees=False) for node in NODES[1:])]
    found = findings(blind)
    assert [finding.node for finding in found] == ["n1", "n2", "n3"]
    assert all(finding.blamed == () and "run.dir" in finding.remedy for finding in found)


def test_nodes_on_one_machine_meet_on_its_loopback_address() -> None:
    local = [replace(node, addresses=("127.0.0.1",)) for node in NODES[:2]]
    assert findings([replace(node, network="one") for node in local]) == []
    assert [finding.check for finding in findings(local)] == ["host name", "host name"]


def test_a_node_that_never_reports_is_named() -> None:
    names = ("n0", "n1", "n2", "n3")
    (finding,) = check_absent(names, True, [NODES[0], NODES[1], NODES[3]], 20)
    assert str(finding).startswith("n2: report: got none in 20 s, wanted one from each node.")
    assert finding.blamed == ("n2",)
    assert list(check_absent(names, True, NODES, 20)) == []
    (finding,) = check_absent(("n0", "node 1"), False, NODES[:1], 20)
    assert finding.node == "node 1" and finding.blamed == (), "that is no name which --exclude knows"


def test_when_nobody_reports_the_way_to_node_0_is_suspected() -> None:
    found = list(check_absent(("n0", "n1", "n2", "n3"), True, NODES[:1], 20))
    assert len(found) == 3 and all(finding.blamed == () and "--master-addr" in finding.remedy for finding in found)


def test_nodes_to_leave_out() -> None:
    few = changed(1, gpus=()) + changed(2, addresses=())
    assert to_leave_out(few, 4) == ["n1", "n2"]
    everywhere = findings([replace(node, gpus=(H200,) * 4) for node in NODES])
    assert len(everywhere) == 4 and to_leave_out(everywhere, 4) == [], "the job asks for too many"
    errors = (InstalledGpu("NVIDIA H200", 1),) * 8
    assert to_leave_out(findings([replace(NODES[0], gpus=errors)]), 1) == ["n0"]


def speeds(axis: str, groups: dict[tuple[int, ...], float]) -> list[GroupSpeed]:
    return [GroupSpeed(axis, ranks, gbytes) for ranks, gbytes in groups.items()]


FLOORS = PreflightConfig(floor_within_node=100.0, floor_between_nodes=10.0)
NAMES = ("n0", "n1", "n2", "n3")


def test_a_slow_group_within_a_node_blames_it() -> None:
    found = list(check_speeds(speeds("TP", {(0, 1): 300, (2, 3): 20, (4, 5): 300, (6, 7): 300}), NAMES, 2, FLOORS))
    assert [(finding.node, finding.check, finding.blamed) for finding in found] == [("n1", "all-reduce, TP", ("n1",))]
    assert found[0].got == "20 GB/s among ranks 2, 3" and found[0].wanted == "at least 100 GB/s"
    assert "NCCL_SOCKET_IFNAME" in found[0].remedy and "floor_within_node" in found[0].remedy


def test_who_is_in_slow_groups_only_is_suspected() -> None:
    """PP groups (0, 4), (1, 5), ... of four nodes of two: n0 with n2, n1 with n3."""
    groups = {(0, 4): 20.0, (1, 5): 20.0, (2, 6): 3.0, (3, 7): 3.0}
    found = list(check_speeds(speeds("PP", groups), NAMES, 2, FLOORS))
    assert [(finding.node, finding.blamed) for finding in found] == [("n1, n3", ("n1", "n3"))] * 2
    found = list(check_speeds(speeds("DP", dict.fromkeys(groups, 3.0)), NAMES, 2, FLOORS))
    assert len(found) == 4 and all(finding.blamed == () for finding in found), "all are slow: it is the network"


def test_fast_groups_pass() -> None:
    assert list(check_speeds(speeds("DP", {(0, 2, 4, 6): 10.0, (1, 3, 5, 7): 10.5}), NAMES, 2, FLOORS)) == []


def outcome(node: int, *places: int, in_time: bool = False, error: str = "") -> RanksOutcome:
    at = tuple(RankPlace(2 * node + index, count, f"place {count}") for index, count in enumerate(places))
    return RanksOutcome(f"n{node}", 2 * node, in_time, at, error)


def test_ranks_that_the_others_wait_for_are_named() -> None:
    (finding,) = check_ranks([outcome(0, 3, 3), outcome(1, 3, 2), outcome(2, 3, 3)], 2, 35, "LOGS")
    assert finding.node == "n1" and finding.blamed == ("n1",)
    assert finding.got == "rank 3 in place 2 after 35 s" and finding.wanted == "all ranks in place 3"
    assert "LOGS" in finding.remedy


def test_ranks_that_never_began_are_named() -> None:
    (finding,) = check_ranks([outcome(0, 1, 1), outcome(1, 1)], 2, 35, "LOGS")
    assert finding.got == "rank 3 in its start after 35 s" and finding.blamed == ("n1",)
    assert "IFNAME" not in finding.remedy, "it has not tried the network"


def test_a_slow_start_is_no_fault_of_the_network() -> None:
    """As where many ranks load torch from one file system."""
    (finding,) = check_ranks([outcome(0), outcome(1)], 2, 35, "LOGS")
    assert "started slowly: none had loaded torch after 35 s" in finding.got and finding.blamed == ()
    assert "IFNAME" not in finding.remedy and "Raise launch.preflight.allreduce_seconds" in finding.remedy


def test_when_all_ranks_hang_in_one_place_no_node_is_blamed() -> None:
    (finding,) = check_ranks([outcome(0, 2, 2), outcome(1, 2, 2)], 2, 35, "LOGS")
    assert finding.node == "n0, n1" and "all ranks are in place 2" in finding.got and finding.blamed == ()


def test_a_slow_end_is_no_fault_of_the_network() -> None:
    """The all-reduces had worked; only the processes took long to start or to end."""
    done = [
        replace(outcome(node, 9, 9), places=tuple(RankPlace(2 * node + i, 9, END) for i in (0, 1))) for node in (0, 1)
    ]
    (finding,) = check_ranks(done, 2, 35, "LOGS")
    assert "ended slowly: the all-reduces had worked" in finding.got and finding.blamed == ()
    assert "launch.preflight.allreduce_seconds=35" in finding.wanted and "IFNAME" not in finding.remedy
    for hung in ([outcome(0, 2, 2), outcome(1, 2, 2)], [outcome(0, 2, 2), outcome(1, 2, 1)]):
        (finding,) = check_ranks(hung, 2, 35, "LOGS")
        assert "IFNAME" in finding.remedy and "launch.preflight.allreduce_seconds" in finding.remedy


def test_a_crash_is_told_apart_from_what_it_caused() -> None:
    crashed = outcome(1, 2, 2, in_time=True, error="rank 2: RuntimeError: CUDA error")
    lost = outcome(0, 2, 2, error="rank 0: RuntimeError: Connection closed by peer")
    (finding,) = check_ranks([lost, crashed], 2, 35, "LOGS")
    assert (finding.node, finding.got) == ("n1", "rank 2: RuntimeError: CUDA error")


def test_ranks_that_ended_are_well() -> None:
    assert list(check_ranks([outcome(0, 3, 3, in_time=True)], 2, 35, "LOGS")) == []


def test_gpus_as_nvidia_smi_lists_them() -> None:
    text = "NVIDIA H200, 580.1, 0\nNVIDIA H200, 580.1, 2\nNVIDIA T4, 580.1, [N/A]\n"
    gpus, same = parse_nvidia_smi(text, {})
    assert gpus == (H200, InstalledGpu("NVIDIA H200", 2), InstalledGpu("NVIDIA T4", None))
    assert same == {"driver": "580.1", "GPU": "NVIDIA H200, NVIDIA T4"}
    assert parse_nvidia_smi(text, {"CUDA_VISIBLE_DEVICES": "2"})[0] == (InstalledGpu("NVIDIA T4", None),)
    assert parse_nvidia_smi(text, {"CUDA_VISIBLE_DEVICES": ""})[0] == ()
    assert len(parse_nvidia_smi(text, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})[0]) == 2


def fake_nvidia_smi(folder: Path, body: str) -> None:
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_a_node_counts_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path / "bin", "echo 'NVIDIA H200, 580.1, 0'; echo 'NVIDIA H200, 580.1, 0'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report = local_report("n0", 0, tmp_path, with_gpus=True, seconds=60)
    assert report.gpus == (H200, H200) and report.versions["driver"] == "580.1" and report.unanswered == {}
    assert local_report("n0", 0, tmp_path, with_gpus=False, seconds=60).gpus is None


def test_a_dead_driver_is_one_missing_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path / "bin", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    report = local_report("n0", 0, tmp_path, with_gpus=True, seconds=60)
    said = "nvidia-smi ended with 18: Failed to initialize NVML: Driver/library version mismatch"
    assert report.gpus is None and report.unanswered == {"GPUs": said}
    assert report.versions["torch"] and report.free_bytes


def test_a_check_that_hangs_is_left_behind() -> None:
    never = threading.Event()
    assert TimedCheck(never.wait).failure(time.monotonic() + 1) == "no answer in 1 s"
    never.set()
    assert TimedCheck(never.wait).failure(time.monotonic() + 60) is None


def test_what_a_run_has_written_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(100, 60, 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").write_bytes(b"0" * 50)
    assert free_bytes(tmp_path / "not" / "there") == 40
    assert free_bytes(tmp_path / "run") == 90


def test_an_address_is_ones_own_or_not() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("203.0.113.1"), "an address of the documentation's network is nobody's"


def test_how_much_a_run_writes_by_hand() -> None:
    """Two bf16 models of 10 parameters: 2 * 10 * 2. Two checkpoints: 2 * 10 * (2 + 8 + 4). 5 tokens: 5 * 12."""
    need = DiskNeed(parameters=10, bf16=True, exports=2, kept_checkpoints=1, sampled_tokens=5)
    assert (need.export_bytes, need.checkpoint_bytes, need.sample_bytes, need.total) == (40, 280, 60, 380)
    assert replace(need, bf16=False).checkpoint_bytes == 2 * 10 * 12, "fp32 weights need no copy"


def test_parameters_are_those_of_the_weight_table() -> None:
    shape = LlamaShape(3, 64, 192, 8, 2, 131, 128, 1e-5, 10000.0)
    assert ModelSizes(3, 64, 192, 8, 2, 131).parameters == sum(map(prod, huggingface_shapes(shape).values()))


def test_the_70b_preset_needs_terabytes() -> None:
    config = load_config(ROOT / "launch/configs/llama2_70b_64gpu.yaml")
    need = disk_need(config, model_folders(config))
    assert round(need.parameters / 1e9) == 69
    assert 3.2e12 < need.total < 3.5e12


@pytest.mark.parametrize(
    ("overrides", "models"),
    [
        ([], 4),  # M0 is pre-trained, M1, M2, M3
        (["run.rounds=0"], 2),
        (["pretrain=null", "model.path=models/x"], 3),
        (["pretrain=null"], 4),  # M0 is random weights
        (["eft.build=true", "seed_data.num_eft_sources=20"], 5),
        (["early_stopping={judge: {model: models/judge}}", "evaluation.pairwise=true"], 6),
        (["sampler.backend=trtllm_torch", "sampler.quantization=fp8", "sampler.device=cuda"], 8),
        (["sampler.backend=trtllm_engine", "sampler.device=cuda"], 12),
    ],
)
def test_every_model_that_is_written_needs_disk(overrides: list[str], models: int) -> None:
    assert model_folders(load_config(ROOT / "launch/configs/toy_cpu.yaml", overrides)) == models


RANGE = (10_000, 29_999)


def slurm(**more: str) -> dict[str, str]:
    return {"SLURM_NNODES": "2", "SLURM_PROCID": "1", "SLURMD_NODENAME": "n7", "MASTER_ADDR": "10.0.0.1", **more}


def test_slurm_says_which_node_this_is() -> None:
    place = this_node(slurm(SLURM_JOB_ID="12345"), None, None, None, None, RANGE)
    assert (place.rank, place.name, place.names) == (1, "n7", ("node 0", "n7"))
    assert (place.head, place.ports[0]) == ("10.0.0.1", 10_000 + 12345)


def test_options_come_before_slurm() -> None:
    place = this_node(slurm(), 2, 3, "10.0.0.9", 4000, RANGE)
    assert (place.rank, len(place.names), place.head, place.ports) == (2, 3, "10.0.0.9", (4000, 4001))


def test_slurms_names_of_the_other_nodes() -> None:
    environment = {"SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n7", "SLURM_JOB_NODELIST": "n[7-8]"}
    place = this_node(environment, None, None, None, None, RANGE)
    assert (place.names, place.named, place.head) == (("n7", "n8"), True, "n7")


@pytest.mark.parametrize(
    ("compact", "names"),
    [
        ("", ""),
        ("n7", "n7"),
        ("n7,login", "n7 login"),
        ("gpu[08-10,12],login1", "gpu08 gpu09 gpu10 gpu12 login1"),
        ("r[1-2]n[3,5-6]-ib", "r1n3-ib r1n5-ib r1n6-ib r2n3-ib r2n5-ib r2n6-ib"),
    ],
)
def test_slurms_short_form_of_names(compact: str, names: str) -> None:
    assert expand(compact) == names.split()


@pytest.mark.parametrize(
    ("rank", "nodes", "said"), [(2, 2, "ranks go from 0 to 1"), (1, 2, "does not know where node 0 is")]
)
def test_an_unclear_place_is_refused(rank: int, nodes: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        this_node({}, rank, nodes, None, None, RANGE)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_JOB_NODELIST": "n[a-b]", "SLURM_NNODES": "2", "SLURM_PROCID": "1"}, r"has the range \[a-b\]"),
        ({"SLURM_PROCID": "first"}, "SLURM_PROCID must be a number, got 'first'"),
        ({"SLURM_NNODES": ""}, "SLURM_NNODES must be a number, got ''"),
        ({"SLURM_JOB_ID": "12+3"}, "SLURM_JOB_ID must be a number"),
    ],
)
def test_variables_that_cannot_be_read_are_named(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        this_node(variables, None, None, None, None, RANGE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("script", "places", "error"),
    [
        ("echo '3 the end' > $0/rank_0", (RankPlace(0, 3, "the end"),), ""),
        ("printf '1 DP\\nRuntimeError: no' > $0/rank_0; exit 1", (RankPlace(0, 1, "DP"),),
         "rank 0: RuntimeError: no"),
        ("echo cannot bind >&2; exit 3", (), "torchrun ended with 3: cannot bind"),
    ],
)  # fmt: skip
def test_how_ranks_end(script: str, places: tuple[RankPlace, ...], error: str, tmp_path: Path) -> None:
    done = run_ranks(["sh", "-c", script, str(tmp_path)], os.environ, "n0", 0, tmp_path, tmp_path / "log", 60)
    assert done == RanksOutcome("n0", 0, True, places, error)


def test_ranks_that_do_not_end_are_ended(tmp_path: Path) -> None:
    (tmp_path / "rank_1").write_text("1 the all-reduce of DP")
    done = run_ranks(["sleep", "60"], os.environ, "n0", 0, tmp_path, tmp_path / "log", 0.2)
    assert done == RanksOutcome("n0", 0, False, (RankPlace(1, 1, "the all-reduce of DP"),), "")


def test_fewer_nodes_than_the_layout_takes_are_looked_at_without_it(tmp_path: Path) -> None:
    """As in a job that samples."""
    config = load_config(TOY, ["launch.nodes=2", "launch.processes_per_node=1", f"run.dir={tmp_path / 'run'}"])
    console = Console(record=True, width=200)
    coordinator.run_preflight(config, [], tmp_path, this_node({}, None, None, None, None, RANGE), 4, console)
    said = console.export_text()
    assert "No all-reduce: the layout takes launch.nodes=2, and 1 take part" in said and "1 nodes are well" in said


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"port {port} on 0\.0\.0\.0 is taken.*give others .*--master-port"):
            coordinator.open_roll_call(this_node({}, 0, 2, None, port, RANGE), "attempt", "token")


def test_gpus_are_trainings_or_else_samplings() -> None:
    presets = ROOT / "launch/configs"
    big = load_config(presets / "llama2_70b_64gpu.yaml", ["sampler.devices_per_node=4"])
    assert (coordinator.gpus_of(big, 8), coordinator.gpus_of(big, 2)) == (8, 4)
    assert coordinator.gpus_of(load_config(TOY), 1) is None


@pytest.mark.timing
def test_a_missing_node_ends_the_preflight_with_its_name(tmp_path: Path, srlm: Path) -> None:
    """Alone where two are wanted; bad_nodes is there for the job's `--exclude`."""
    environment = os.environ | slurm(MASTER_ADDR="127.0.0.1", SLURM_PROCID="0", SLURM_JOB_NODELIST="n[7-8]")
    argv = [str(srlm), "launch", "preflight", str(TOY), "--out", str(tmp_path), "launch.nodes=2"]
    argv += ["launch.processes_per_node=1", "launch.preflight.report_seconds=1", f"--master-port={free_port()}"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "n8: report: got none in 1 s, wanted one from each node. Look at the node" in done.stderr
    assert (tmp_path / "bad_nodes").read_text() == "n8\n"
    assert "n7" in done.stdout and (tmp_path / "n7.json").is_file()


@pytest.mark.timing
def test_a_node_that_cannot_reach_node_0_says_so(tmp_path: Path, srlm: Path) -> None:
    argv = [str(srlm), "launch", "preflight", str(TOY), "--out", str(tmp_path), "launch.nodes=2"]
    argv += ["launch.processes_per_node=1", "launch.preflight.report_seconds=1", f"--master-port={free_port()}"]
    argv += ["--master-addr=127.0.0.1", "--node-rank=1", "--nnodes=2"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no answer of node 0 at 127.0.0.1, port " in done.stderr and "--master-addr" in done.stderr


def two_nodes(srlm: Path, out: Path, *overrides: str, second: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Both nodes on this machine: exit code, stdout and stderr of node 0."""
    argv = [str(srlm), "launch", "preflight", str(TOY), "--out", str(out), "launch.nodes=2", f"run.dir={out}"]
    argv += ["launch.processes_per_node=1", "launch.preflight.allreduce_seconds=300", *overrides]
    common = {**os.environ, **slurm(MASTER_ADDR="127.0.0.1", SLURM_JOB_ID=str(os.getpid()))}
    other = subprocess.Popen(argv, env=common | (second or {}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        own = common | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n6"}
        done = subprocess.run(argv, env=own, capture_output=True, text=True)
        _, said = other.communicate(timeout=240)
    finally:
        other.kill()
    assert said == b"", "node 0 speaks for all"
    return done.returncode, done.stdout, done.stderr


@pytest.mark.timing
@pytest.mark.extra
def test_two_nodes_on_one_machine(srlm: Path, tmp_path: Path) -> None:
    code, said, wrong = two_nodes(srlm, tmp_path / "a")
    assert (code, wrong) == (0, "")
    assert "PP: 1 x 2 ranks" in said and "2 nodes are well" in said
    assert not (tmp_path / "a" / "bad_nodes").exists()


@pytest.mark.timing
@pytest.mark.extra
def test_a_floor_that_no_network_reaches_is_missed(srlm: Path, tmp_path: Path) -> None:
    floor = "launch.preflight.floor_between_nodes=1e6"
    code, _, wrong = two_nodes(srlm, tmp_path, floor, "parallel.pipeline_model_parallel_size=1")
    assert code == 2 and "n6, n7: all-reduce, DP: got" in wrong and "wanted at least 1e+06 GB/s" in wrong


@pytest.mark.timing
@pytest.mark.extra
def test_an_environment_that_differs_and_a_rank_that_cannot_start(srlm: Path, tmp_path: Path) -> None:
    """The second node finds another torch before the real one: an older one by its name, and it cannot be imported."""
    fake = tmp_path / "fake"
    (fake / "torch").mkdir(parents=True)
    (fake / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    (fake / "torch-1.0.dist-info").mkdir()
    (fake / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    path = f"{fake}:{os.environ.get('PYTHONPATH', '')}"
    limit = "launch.preflight.allreduce_seconds=30"
    code, _, wrong = two_nodes(srlm, tmp_path / "out", limit, second={"PYTHONPATH": path})
    assert code == 2
    assert f"versions: got torch {version('torch')} on n6; torch 1.0 on n7" in wrong
    assert "n7: all-reduce: got torchrun ended with 1" in wrong and "libcudart.so.13" in wrong
    assert (tmp_path / "out" / "bad_nodes").read_text() == "n7\n"
