"""Checkpoints whose pickles run something, or are damaged: refused by every reader, and nothing is run."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from test_convert import model, there
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from typer.testing import CliRunner

from srlm_mega.checkpoints_conversion.convert import Kind, open_checkpoint
from srlm_mega.checkpoints_conversion.plain_pickle import METADATA_NAMES, read_metadata, unpickled
from srlm_mega.checkpoints_conversion.verify import prove
from srlm_mega.cli.main import app
from srlm_mega.config.training import ParallelConfig, TrainerConfig
from srlm_mega.errors import UserError
from srlm_mega.training.checkpoint import Checkpoints, as_data, check_layer_states
from srlm_mega.training.topology import Topology


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(path: Path) -> Runs:
    return Runs(os.system, f"touch {path}")


def attacks(target: Path) -> dict[str, bytes]:
    """Pickles that make a file, in the ways of the format."""
    command, hidden = f"touch {target}", Metadata({}, storage_data={})
    hidden.planner_data = [{"deep": touch(target)}]
    dotted = b"\x80\x04\x8c\x1etorch.distributed.checkpoint.filesystem\x8c\tos.system\x93"
    dotted = dotted.replace(b"\x8c\x1e", b"\x8c" + bytes([len("torch.distributed.checkpoint.filesystem")]))
    return {
        "a call": pickle.dumps(touch(target)),
        "deep within": pickle.dumps(hidden),
        "eval": pickle.dumps(Runs(eval, f"__import__('os').system({command!r})")),
        "an old protocol": pickle.dumps(touch(target), protocol=0),
        "INST": b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        "a dotted name": dotted + b"\x8c" + bytes([len(command)]) + command.encode() + b"\x85R.",
        "torch.load": pickle.dumps(Runs(torch.storage._load_from_bytes, pickle.dumps(touch(target)))),
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    return there(model(root / "model"), root / "checkpoint", Kind.MEGATRON, tp=2, pp=2)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A sound checkpoint, to be changed."""
    return Path(copytree(original, tmp_path / "iter_0000002"))


def resume(path: Path) -> None:
    """Read it as a training that goes on from it."""
    alone = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())
    Checkpoints(path.parent, alone, TrainerConfig()).load(path, [], None, 0)  # type: ignore[arg-type]


READERS = {"convert": open_checkpoint, "verify": lambda folder: prove(folder, folder), "resume": resume}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_nothing_is_run(checkpoint: Path, tmp_path: Path, name: str, reader: str) -> None:
    target = tmp_path / "made"
    (checkpoint / ".metadata").write_bytes(attacks(target)[name])
    with pytest.raises(ValueError, match=r"iter_0000002/\.metadata cannot be read \(it asks for [\w.]+, which no such"):
        READERS[reader](checkpoint)
    assert not target.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Negative control: a plain reader runs them."""
    for number, name in enumerate(("a call", "deep within", "eval", "an old protocol", "INST", "a dotted name")):
        pickle.loads(attacks(tmp_path / str(number))[name])
        assert (tmp_path / str(number)).exists(), name


def test_a_path_that_a_newer_python_wrote() -> None:
    """Python 3.13's paths are of pathlib._local, which older ones do not have."""
    newer = b"cpathlib._local\nPosixPath\n(Va\nVb\ntR."
    assert unpickled(newer, METADATA_NAMES, "it") == Path("a/b")


def test_the_command_says_it_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(touch(tmp_path / "made")))
    done = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "out"), "--to", "huggingface"])
    assert isinstance(done.exception, UserError) and "asks for posix.system" in str(done.exception)
    assert not (tmp_path / "made").exists() and not (tmp_path / "out").exists()


def test_common_state_that_runs_something_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """And one that is no archive, or of another form, is the user's, not a crash."""
    torch.save({"position": touch(tmp_path / "made")}, checkpoint / "common.pt")
    with pytest.raises(UserError, match=r"does not fit this model \(a file is damaged, or asks.*or remove .* anew"):
        resume(checkpoint)
    assert not (tmp_path / "made").exists()
    for content in (b"", b"PK\x03\x04 cut", b"\x80\x04N.", (checkpoint / "common.pt").read_bytes()[:-40]):
        (checkpoint / "common.pt").write_bytes(content)
        with pytest.raises(UserError, match="iter_0000002 does not fit this model"):
            resume(checkpoint)
    for value in ([], {"position": 5}, {"position": {"step": 1, "other": 2}}, {"position": {"step": 1}}):
        torch.save(value, checkpoint / "common.pt")
        with pytest.raises(UserError, match="iter_0000002 does not fit this model"):
            resume(checkpoint)


def test_a_bug_is_no_fault_of_the_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a crash, with its traceback."""

    class Buggy:
        param_groups = ()

        def load_state_dict(self, state: object) -> None:
            raise TypeError("a bug")

    alone = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())
    common = {"position": {}, "layout": {}, "distributed_optimizer": alone.parallel.use_distributed_optimizer}
    monkeypatch.setattr("srlm_mega.training.checkpoint.load_common", lambda path: common)
    monkeypatch.setattr(Checkpoints, "sharded_state", lambda *arguments, **options: {})
    monkeypatch.setattr("srlm_mega.training.checkpoint.dist_checkpointing.load", lambda *arguments: {"optimizer": 0})
    with pytest.raises(TypeError, match="a bug"):
        Checkpoints(checkpoint.parent, alone, TrainerConfig()).load(checkpoint, [], Buggy(), 0)  # type: ignore[arg-type]


def test_objects_beside_the_tensors_are_data_too(tmp_path: Path) -> None:
    """torch reads them with weights_only=False."""

    def read() -> None:
        load({"state": None}, storage_reader=FileSystemReader(tmp_path / "saved"), no_dist=True)

    save({"state": touch(tmp_path / "made")}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(BaseException, match="Weights only load failed"), as_data():
        read()
    assert not (tmp_path / "made").exists()
    read()
    assert (tmp_path / "made").exists(), "control: else they would run it"


def test_states_of_layers_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    def content(value: object) -> dict[str, torch.Tensor]:
        return {"a._extra_state": torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)}

    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"n": (1, "x")}}
    within = Runs(torch.storage._load_from_bytes, pickle.dumps(touch(tmp_path / "made")))
    with as_data():
        check_layer_states(content(state) | {"b._extra_state": torch.empty(0)}, tmp_path)
    for hostile in (touch(tmp_path / "made"), {"recipe": touch(tmp_path / "made")}, within):
        with pytest.raises(Exception, match=r"a\._extra_state in .* cannot be read"), as_data():
            check_layer_states(content(hostile), tmp_path)
    assert not (tmp_path / "made").exists()


def test_plans_of_megatrons_ranks_may_be_in_it(checkpoint: Path) -> None:
    metadata = read_metadata(checkpoint)
    key, entry = next(iter(metadata.state_dict_metadata.items()))
    index = MetadataIndex(key, entry.chunks[0].offsets)
    data = TensorWriteData(entry.chunks[0], entry.properties, entry.size)
    plan = SavePlan([WriteItem(index, WriteItemType.SHARD, tensor_data=data)])
    metadata.all_local_plans = [plan]  # type: ignore[attr-defined]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert open_checkpoint(checkpoint).sources


def changed(checkpoint: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


PLACE: Callable[[Any], Any] = lambda metadata: next(iter(metadata.storage_data.values()))  # noqa: E731
TENSOR: Callable[[Any], Any] = lambda metadata: next(iter(metadata.state_dict_metadata.values()))  # noqa: E731
CHANGES: dict[str, Callable[[Any], object]] = {
    "a file outside": lambda found: setattr(PLACE(found), "relative_path", "../model/model.safetensors"),
    "an absolute file": lambda found: setattr(PLACE(found), "relative_path", "/etc/passwd"),
    "no text": lambda found: setattr(PLACE(found), "relative_path", 5),
    "a negative offset": lambda found: setattr(PLACE(found), "offset", -1),
    "an offset that is none": lambda found: setattr(PLACE(found), "offset", "0"),
    "a place far behind the end": lambda found: setattr(PLACE(found), "offset", 1 << 62),
    "no place": lambda found: found.storage_data.clear(),
    "places that are none": lambda found: setattr(found, "storage_data", [1]),
    "no tensors": lambda found: setattr(found, "state_dict_metadata", None),
    "no dtype": lambda found: setattr(TENSOR(found).properties, "dtype", "float32"),
    "no size": lambda found: setattr(TENSOR(found), "size", None),
    "a negative size": lambda found: setattr(TENSOR(found), "size", torch.Size([-1, 32])),
    "a chunk outside": lambda found: setattr(TENSOR(found).chunks[0], "sizes", torch.Size([1 << 40, 32])),
    "a chunk that is none": lambda found: TENSOR(found).chunks.append(3),
    "an object without its fields": lambda found: found.__dict__.clear(),
    "another object": lambda found: found.state_dict_metadata.update(x=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damage_is_named_with_its_file(checkpoint: Path, name: str) -> None:
    changed(checkpoint, CHANGES[name])
    with pytest.raises(ValueError, match=r"iter_0000002/[\w.]+ is (truncated or )?damaged"):
        open_checkpoint(checkpoint)


def test_any_wrong_byte_is_found_or_harmless(checkpoint: Path) -> None:
    file = checkpoint / ".metadata"
    sound, rng = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(sound)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        cut = rng.randrange(len(content)) if rng.random() < 0.1 else len(content)
        file.write_bytes(content[:cut])
        try:
            open_checkpoint(checkpoint)
        except ValueError as error:
            refused += 1
            assert str(checkpoint) in str(error)
    assert refused > 100
