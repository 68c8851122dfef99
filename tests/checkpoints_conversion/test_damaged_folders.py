"""Model folders whose files are damaged or made up: every reader says which file, and none ends in a traceback."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import orjson
import pytest
from llama_folders import save_model
from model_weights import SHAPE, weights_of
from test_convert import there

from srlm_mega.chat import Chat
from srlm_mega.checkpoints_conversion import json_files
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.convert import Kind, open_checkpoint, read_record
from srlm_mega.checkpoints_conversion.fp8 import Amax
from srlm_mega.checkpoints_conversion.huggingface import open_weights, write_folder
from srlm_mega.checkpoints_conversion.json_files import bounded_lines
from srlm_mega.checkpoints_conversion.model_folder import check_model_folder
from srlm_mega.config.outside_models import shape_in
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import ModelLimits

VOCABULARY = replace(SHAPE, vocab_size=128)
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"
READERS: dict[str, Callable[[Path], object]] = {
    "run": lambda folder: check_model_folder(folder, False),
    "configuration": shape_in,
    "convert": open_checkpoint,
    "trainer": lambda folder: dict(open_weights(folder)),
    "sampler": ModelLimits.of_folder,
    "chat": lambda folder: Chat.from_folder(folder).prompt("list 4"),
}
WEIGHTS = {"run", "convert", "trainer"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    tokenizer = save_model(root / "theirs")
    write_folder(root / "model", VOCABULARY, weights_of(VOCABULARY), tokenizer, max_shard_bytes=30_000)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (root / "model" / name).write_bytes(b"{}")
    assert (root / "model" / SHARD).is_file()
    return root / "model"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A sound folder, to be changed."""
    return Path(copytree(original, tmp_path / "model"))


def complaints(folder: Path, file: str, readers: Iterable[str] = WEIGHTS) -> dict[str, str]:
    """What each reader says who does not take the folder: with the file's name, on no more than a screen."""
    said = {}
    for name in readers:
        try:
            READERS[name](folder)
        except ValueError as error:
            said[name] = str(error)
            assert str(folder / file) in said[name] or (str(folder) in said[name] and file in said[name]), said
            assert len(said[name]) < 2000
    return said


def test_a_sound_folder_is_taken_by_all(folder: Path) -> None:
    assert complaints(folder, "", READERS) == {}


NO_OBJECT = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "nothing": b"",
    "cut": b'{"a": [1, 2',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "no UTF-8": b'{"a": "\xff"}',
    "deep lists": b'{"a":' + b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a lone surrogate": b'{"a": "\\ud800"}',
    "NaN": b'{"a": NaN}',
    "a key twice": b'{"vocab_size": 128, "vocab_size": 64}',
    "a key twice, within": b'{"a": [{"b": 1, "b": 1}]}',
    "many digits": b'{"a": ' + b"9" * 5000 + b"x}",
}
READ_BY = {
    "config.json": set(READERS) - {"chat"},  # which asks it for end tokens alone, after generation_config.json
    "generation_config.json": {"chat"},
    "tokenizer_config.json": {"chat"},
    "special_tokens_map.json": {"chat"},
    "added_tokens.json": {"chat"},
    INDEX: WEIGHTS,
}


@pytest.mark.parametrize("damage", NO_OBJECT)
@pytest.mark.parametrize("file", READ_BY)
def test_what_is_no_object(folder: Path, file: str, damage: str) -> None:
    (folder / file).write_bytes(NO_OBJECT[damage])
    assert complaints(folder, file, READ_BY[file]).keys() == READ_BY[file]


def test_what_is_huge(folder: Path) -> None:
    with (folder / "config.json").open("wb") as content:
        content.truncate(1 << 40)  # a hole
    assert "is larger than 32 MiB" in complaints(folder, "config.json")["convert"]


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_what_is_no_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert complaints(folder, "tokenizer.json", READERS).keys() == {"run", "chat"}


def test_a_tokenizer_that_ends_the_process_is_not_read(folder: Path) -> None:
    """The library cuts the second part of a merge by the prefix, within a letter of several bytes."""
    model = {
        "type": "BPE",
        "continuing_subword_prefix": "x",
        "vocab": {"a": 0, "\u0120": 1, "a\u0120": 2},
        "merges": [["a", "\u0120"]],
    }
    (folder / "tokenizer.json").write_bytes(orjson.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert complaints(folder, "tokenizer.json", READERS).keys() == {"run", "chat"}


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 1e300, 10**12, "", "x", "128", [], [1], {}, {"a": 1}, [[]], {"rope_type": 5},
)  # fmt: skip
CHECKED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "rope_scaling", "rope_parameters", "head_dim", "model_type", "hidden_act",
    "attention_bias", "mlp_bias", "quantization_config", "torch_dtype", "architectures",
)  # fmt: skip


@pytest.mark.parametrize("key", CHECKED)
def test_any_value_of_any_key_is_taken_or_named(folder: Path, key: str) -> None:
    content = orjson.loads((folder / "config.json").read_bytes())
    refused = 0
    for value in VALUES:
        (folder / "config.json").write_bytes(orjson.dumps(content | {key: value}))
        refused += bool(complaints(folder, "", ["configuration", "convert", "sampler"]))
    assert refused or key in ("quantization_config", "torch_dtype", "architectures")  # which nothing here depends on


SPECIAL: dict[str, tuple[Any, ...]] = {
    "bos_token": (5, [], {"content": 5}, {}),
    "eos_token": (True, ["</s>"], {"content": None}),
    "chat_template": (5, {"default": 5}, True),
    "added_tokens_decoder": (5, "x", [5], {"1": 5}, {"1": {"content": []}}),
    "additional_special_tokens": (5, "<s>", [5], [["<s>"]]),
    "extra_special_tokens": (5, "<s>", {"image": 5}),
}


@pytest.mark.parametrize("key", SPECIAL)
def test_tokens_of_other_types_are_refused(folder: Path, key: str) -> None:
    (folder / "chat_template.jinja").unlink()
    content = orjson.loads((folder / "tokenizer_config.json").read_bytes())
    for value in SPECIAL[key]:
        (folder / "tokenizer_config.json").write_bytes(orjson.dumps(content | {key: value}))
        assert complaints(folder, "", ["chat"]), value


@pytest.mark.parametrize("value", [True, "2", 10**6, -1, 2.0, {}, [[2]], [None]])
def test_end_tokens_of_other_types_are_refused(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_bytes(orjson.dumps({"eos_token_id": value}))
    assert complaints(folder, "generation_config.json", ["chat"])


NORM = "model.norm.weight"
INDEXES: dict[str, Any] = {
    "no map": {},
    "a list": {"weight_map": []},
    "null": {"weight_map": None},
    "a number": {NORM: 5},
    "a list of files": {NORM: [SHARD]},
    "a missing file": {NORM: "model-00009-of-00009.safetensors"},
    "outside": {NORM: f"../model/{SHARD}"},
    "absolute": {NORM: "/etc/passwd"},
    "below": {NORM: f"./{SHARD}"},
    "a folder": {NORM: "."},
    "nothing": {NORM: ""},
    "another file": {NORM: "config.json"},
    "an unknown tensor": {"model.other.weight": SHARD},
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_leads_elsewhere(folder: Path, name: str) -> None:
    content = orjson.loads((folder / INDEX).read_bytes())
    change = INDEXES[name]
    if "weight_map" in change or not change:
        content = change
    else:
        content["weight_map"] |= change
    (folder / INDEX).write_bytes(orjson.dumps(content))
    assert complaints(folder, "").keys() == WEIGHTS


def test_a_weight_that_is_named_twice(folder: Path) -> None:
    content = (folder / INDEX).read_bytes()
    named = b'"weight_map": {'
    assert named in content
    (folder / INDEX).write_bytes(content.replace(named, named + b'"model.norm.weight": "elsewhere",'))
    said = complaints(folder, INDEX)
    assert said.keys() == WEIGHTS and "'model.norm.weight' is given twice" in said["run"]


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file's header and leave its numbers."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = orjson.loads(content[8 : 8 + length])
    change(header)
    text = orjson.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of the first tensor of a header."""
    found: dict[str, Any] = next(value for name, value in header.items() if name != "__metadata__")
    return found


def last(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = list(header.values())[-1]
    return found


def moved(entry: dict[str, Any], by: int) -> None:
    entry["data_offsets"] = [one + by for one in entry["data_offsets"]]


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tensor left": lambda header: header.clear(),
    "no entry": lambda header: header.update({"x": None}),
    "an entry of text": lambda header: header.update({"x": "F32"}),
    "no dtype": lambda header: first(header).pop("dtype"),
    "another dtype": lambda header: first(header).update(dtype="I64"),
    "a dtype of another type": lambda header: first(header).update(dtype=[]),
    "no shape": lambda header: first(header).pop("shape"),
    "a shape of text": lambda header: first(header).update(shape="32"),
    "a negative shape": lambda header: first(header).update(shape=[-1, 32]),
    "a fractional shape": lambda header: first(header).update(shape=[1.5]),
    "a huge shape": lambda header: first(header).update(shape=[1 << 60, 1 << 60]),
    "no offsets": lambda header: first(header).pop("data_offsets"),
    "one offset": lambda header: first(header).update(data_offsets=[0]),
    "offsets of text": lambda header: first(header).update(data_offsets=["0", "128"]),
    "offsets in the other order": lambda header: first(header)["data_offsets"].reverse(),
    "negative offsets": lambda header: moved(first(header), -8),
    "offsets that overlap": lambda header: moved(first(header), 8),
    "offsets of another tensor": lambda header: moved(last(header), -64),
    "offsets behind the end": lambda header: moved(last(header), 64),
    "offsets far behind the end": lambda header: moved(last(header), 1 << 62),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_made_up(folder: Path, name: str) -> None:
    with_header(folder / SHARD, HEADERS[name])
    assert complaints(folder, SHARD).keys() == WEIGHTS


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "half a length": lambda content: content[:4],
    "a length alone": lambda content: content[:8],
    "half a header": lambda content: content[:40],
    "a byte less": lambda content: content[:-1],
    "a huge length": lambda content: b"\xff" * 8 + content[8:],
    "a length of all that is there": lambda content: struct.pack("<Q", len(content) - 8) + content[8:],
    "a list": lambda content: struct.pack("<Q", 2) + b"[]" + content,
    "no JSON": lambda content: struct.pack("<Q", 4) + b"\xff\xff{}" + content,
    "deep nesting": lambda content: struct.pack("<Q", 100_000) + b"[" * 100_000 + content,
}


@pytest.mark.parametrize("name", CUTS)
def test_a_file_that_is_cut(folder: Path, name: str) -> None:
    (folder / SHARD).write_bytes(CUTS[name]((folder / SHARD).read_bytes()))
    assert complaints(folder, SHARD).keys() == WEIGHTS


def test_a_tensor_that_is_there_twice_in_one_header(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    name = next(name for name in orjson.loads(header) if name != "__metadata__")
    text = header[:-1] + b',"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' % name.encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    assert all("is given twice" in one for one in complaints(folder, SHARD).values())


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"kind": "x", "other": 1}', b'{"model": 5}', b"\xff"])
def test_records_of_conversions_and_calibrations(folder: Path, content: bytes) -> None:
    for name in ("conversion.json", "amax.json"):
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"conversion\.json"):
        read_record(folder)
    with pytest.raises(ValueError, match=r"amax\.json"):
        Amax.load(folder / "amax.json", VOCABULARY)


TRTLLM: tuple[dict[str, Any], ...] = (
    {}, {"mapping": None}, {"mapping": []}, {"mapping": {"tp_size": 0, "pp_size": 1}},
    {"mapping": {"tp_size": "2", "pp_size": 1}}, {"mapping": {"tp_size": 10**9, "pp_size": 1}},
    {"norm_epsilon": "x"}, {"num_hidden_layers": 10**9}, {"rotary_scaling": 5}, {"architecture": []},
)  # fmt: skip


@pytest.mark.parametrize("change", TRTLLM)
def test_configurations_of_engines(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = there(folder, tmp_path / "out", Kind.TRTLLM, dtype=DType.BFLOAT16)
    content = orjson.loads((out / "config.json").read_bytes()) | change if change else {"mapping": {}}
    (out / "config.json").write_bytes(orjson.dumps(content))
    with pytest.raises(ValueError, match=r"out/config\.json|rank1\.safetensors"):
        open_checkpoint(out)


def load(folder: Path) -> None:
    """Load a folder to sample it, as a model or judge from outside is in a comparison."""
    open_sampler(SamplerConfig(device="cpu"), folder, end_ids=(2,)).close()


OUTSIDE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a cut file": (SHARD, lambda file: file.write_bytes(file.read_bytes()[:-1])),
    "no header": (SHARD, lambda file: file.write_bytes(b"\xff" * 99)),
    "tensors that overlap": (SHARD, lambda file: with_header(file, lambda header: moved(first(header), 8))),
    "a list of files": (INDEX, lambda file: file.write_bytes(b"[]")),
    "a file elsewhere": (INDEX, lambda file: file.write_bytes(b'{"weight_map": {"model.norm.weight": "../x"}}')),
    "a list": ("config.json", lambda file: file.write_bytes(b"[]")),
    "no UTF-8": ("config.json", lambda file: file.write_bytes(b'{"a": "\xff"}')),
    "another type": ("config.json", lambda file: file.write_bytes(file.read_bytes().replace(b": 32", b': "x"'))),
    "another architecture": ("config.json", lambda file: file.write_bytes(b'{"model_type": ["llama"]}')),
    "code of its own": (
        "config.json",
        lambda file: file.write_bytes(b'{"model_type": "own", "auto_map": {"AutoConfig": "x.X"}, "vocab_size": 1}'),
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_model_from_outside_that_is_sampled(folder: Path, name: str) -> None:
    file, change = OUTSIDE[name]
    change(folder / file)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 2000 and "\n" not in str(error.value)


def test_a_line_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1 << 20)
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"{}\n" + b"x" * (1 << 19) + b"\n" + b"x" * (1 << 21))
    with file.open("rb") as content:
        lines = bounded_lines(content, file)
        assert [len(next(lines)) for _ in range(2)] == [3, (1 << 19) + 1]
        with pytest.raises(ValueError, match=r"x\.jsonl:3: the line is longer than 1 MiB"):
            next(lines)
        assert content.tell() < 2 << 20, "no more was read than the limit"


@pytest.mark.parametrize(
    "value", ["1e999", "-1e999", "NaN", "-Infinity", '"\\ud800"', '"\\uD83D"', '"\ufeff', "01", '"\x01"']
)
def test_json_is_read_once_and_strictly(value: str, tmp_path: Path) -> None:
    """As strictly as orjson does, which does not see that a key is given twice."""
    for content in (f'{{"a": {value}}}', f'\ufeff{{"a": "{value}"}}'):
        with pytest.raises(ValueError, match="x is not JSON"):
            json_files.parse_object(content.encode(), "x")
    good = b'{"a": [1, -2.5, 1e30, true, null, "\\ud83d\\ude00 \\\\ud800", {"b": 36893488147419103232}]}'
    assert json_files.parse_object(good, "x") == orjson.loads(good)
    with pytest.raises(ValueError, match="'b' is given twice"):
        json_files.parse_object(b'{"a": [{"b": 1, "b": 1}]}', "x")
