"""The proof of a conversion is by hash: whatever changed since is named, and never taken."""

import json
import re
from pathlib import Path

import pytest
from llama_folders import save_model

from srlm_mega.checkpoints_conversion import build, verify
from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.model_place import located
from srlm_mega.checkpoints_conversion.verify import check_verified, prove


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill no machines."""
    monkeypatch.setattr(build, "sync", lambda path: None)


@pytest.mark.parametrize("kind", [Kind.HUGGINGFACE, Kind.TRTLLM, Kind.MEGATRON])
def test_a_proof_is_by_hash(tmp_path: Path, kind: Kind) -> None:
    """Of every file: one flipped bit, wherever it is, keeps the size."""
    source = save_model(tmp_path / "model")
    out = there(source, tmp_path / "out", kind)
    prove(source, out, no_bar).save()
    files = [path for path in sorted(out.iterdir()) if path.name != "proof.json"]
    assert {"config.json", "conversion.json"} < {path.name for path in files}
    for file in files:
        flip_bit(file, file.stat().st_size // 2)
        with pytest.raises(ValueError, match=re.escape(file.name)):
            check_verified(out)
        flip_bit(file, file.stat().st_size // 2)
        check_verified(out)


def test_a_proof_of_a_damaged_source_is_none(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    one = there(source, tmp_path / "one", Kind.HUGGINGFACE)
    prove(source, one, no_bar).save()
    flip_bit(one / "model.safetensors", -2)
    other = there(one, tmp_path / "other", Kind.TRTLLM)
    with pytest.raises(ValueError, match=r"one/model\.safetensors is not what was verified"):
        prove(one, other, no_bar)


def test_a_file_that_was_added_or_removed_and_a_proof_without_hashes(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    out = there(source, tmp_path / "out", Kind.HUGGINGFACE)
    prove(source, out, no_bar).save()
    (out / "README.md").write_text("not part of the model")
    check_verified(out)
    (out / "added_tokens.json").write_text("{}")
    with pytest.raises(ValueError, match=r"added_tokens\.json is not what was verified \(it was added\)"):
        check_verified(out)
    (out / "added_tokens.json").unlink()
    proof = json.loads((out / "proof.json").read_bytes())
    for damaged in ({"file_sizes": {}}, {"files": []}, {"files": {"config.json": 1}}, []):
        (out / "proof.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"proof\.json has no hashes .*: srlm convert verify .*model .*out"):
            check_verified(out)
    (out / "proof.json").write_text(json.dumps(proof))
    for lost in ("conversion.json", "config.json"):
        content = (out / lost).read_bytes()
        (out / lost).unlink()
        with pytest.raises(ValueError, match=rf"{lost} is not what was verified \(it is missing\).*convert verify"):
            check_verified(out)
        (out / lost).write_bytes(content)


def test_a_quick_check_reads_no_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "model")
    out = there(source, tmp_path / "out", Kind.HUGGINGFACE)
    prove(source, out, no_bar).save()
    monkeypatch.setattr(verify, "QUICK_HASH_BYTES", 10_000)
    flip_bit(out / "model.safetensors", -2)
    check_verified(out, quick=True)
    with pytest.raises(ValueError, match="is not what was verified"):
        check_verified(out)


def there(source: Path, destination: Path, kind: Kind) -> Path:
    convert(source, destination, Wish(kind, dtype=DType.BFLOAT16), Resources(), no_bar)
    return located(destination)


def flip_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
