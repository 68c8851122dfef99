"""Outputs: atomic, hashed, refused when altered."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from srlm_mega.errors import UserError
from srlm_mega.run.files import discard, write_atomic
from srlm_mega.run.manifest import IDENTITY, MANIFEST, Identity, digest_of, file_hash
from srlm_mega.run.removal import manifests_in
from srlm_mega.run.run_dir import RunDir

IDENTITY_A = Identity("round_1/pairs", {"pairs.min_gap": 0.0}, {"round_1/judgements": "abc"})


def make_output(run: RunDir, identity: Identity = IDENTITY_A, text: str = "one\n") -> Path:
    partial = run.begin(identity, resumable=False)
    (partial / "pairs.jsonl").write_text(text)
    (partial / "metrics.jsonl").write_text("a log\n")
    run.commit(identity, rows=1, seconds=1.5, version="0.1.0", counts={"tied": 2})
    return run.output(identity.stage)


def test_an_output_appears_whole(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    partial = run.begin(IDENTITY_A, resumable=False)
    (partial / "pairs.jsonl").write_text("one\n")
    assert run.manifest("round_1/pairs") is None and not run.output("round_1/pairs").exists()
    run.commit(IDENTITY_A, rows=1, seconds=1.5, version="0.1.0", counts={})
    assert not partial.exists()
    manifest = run.manifest("round_1/pairs")
    assert manifest is not None
    assert manifest.files["pairs.jsonl"].bytes == 4 and manifest.inputs == {"round_1/judgements": "abc"}
    assert not (run.output("round_1/pairs") / IDENTITY).exists()


def test_a_manifest_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srlm run` asks for one while a stage commits: what is renamed meanwhile must not be looked at."""
    run = RunDir(tmp_path)
    make_output(run)
    monkeypatch.setattr("srlm_mega.run.run_dir.manifests_in", lambda root: pytest.fail(f"{root} is searched"))
    assert run.verified("round_1/pairs") is not None and run.verified("M2") is None
    monkeypatch.undo()
    unfinished = tmp_path / "M2.partial" / MANIFEST
    unfinished.parent.mkdir()
    unfinished.write_text("{}")
    real = Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == unfinished:  # it has its other name already
            raise FileNotFoundError(path)
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)
    assert set(manifests_in(tmp_path)) == {"round_1/pairs"}


def test_an_attempts_configuration_is_taken_with_its_first_output(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin_attempt(b"rounds: 2", b"first", at_once=True)
    assert run.config_file.read_bytes() == b"rounds: 2" and not run.attempt.exists()
    make_output(run)
    run.report_file.write_text("of two rounds")
    run.begin_attempt(b"rounds: 3", b"second", at_once=False)
    assert run.config_file.read_bytes() == b"rounds: 2" and run.config_in_force.read_bytes() == b"rounds: 3"
    run.drop_attempt()
    assert run.config_in_force == run.config_file and run.report_file.exists()
    run.begin_attempt(b"rounds: 4", b"third", at_once=False)
    make_output(run, Identity("round_2/pairs", {}, {}))
    assert run.config_file.read_bytes() == b"rounds: 4" and run.provenance_file.read_bytes() == b"third"
    assert not run.attempt.exists() and not run.report_file.exists(), "it is out of date"


def test_a_kill_while_the_configuration_is_taken(tmp_path: Path) -> None:
    """After the first of its two files; and what a killed attempt left is forgotten by the next one."""
    run = RunDir(tmp_path)
    run.begin_attempt(b"rounds: 2", b"first", at_once=True)
    run.begin_attempt(b"rounds: 3", b"second", at_once=False)
    os.replace(run.attempt / "provenance.json", run.provenance_file)
    run.adopt_attempt()
    assert (run.config_file.read_bytes(), run.provenance_file.read_bytes()) == (b"rounds: 3", b"second")
    run.begin_attempt(b"rounds: 9", b"killed", at_once=False)
    run.begin_attempt(b"rounds: 4", b"third", at_once=False)
    assert run.config_in_force.read_bytes() == b"rounds: 4"


def test_digest_is_of_content_not_of_logs_or_time(tmp_path: Path) -> None:
    first, second, third = RunDir(tmp_path / "1"), RunDir(tmp_path / "2"), RunDir(tmp_path / "3")
    make_output(first)
    (make_output(second) / "metrics.jsonl").write_text("another log\n")
    make_output(third, text="two\n")
    assert first.digest("round_1/pairs") == second.digest("round_1/pairs") != third.digest("round_1/pairs")
    second.verify("round_1/pairs", quick=False)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("truncate", "has 3 bytes, its manifest says 4"),
        ("alter", "was altered: its xxh3-128"),
        ("remove", "is missing"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: str, said: str, quick: bool) -> None:
    run = RunDir(tmp_path)
    file = make_output(run) / "pairs.jsonl"
    run.verify("round_1/pairs", quick)
    match damage:
        case "truncate":
            file.write_text("one")
        case "alter":
            file.write_text("onf\n")
        case _:
            file.unlink()
    with pytest.raises(UserError, match=said) as error:
        run.verify("round_1/pairs", quick)
    assert "--redo round_1/pairs" in str(error.value)


def test_partial_is_kept_for_the_same_identity_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.begin(IDENTITY_A, resumable=True) / "shard_00000.jsonl").write_text("done\n")
    assert (run.begin(IDENTITY_A, resumable=True) / "shard_00000.jsonl").exists()
    other = Identity(IDENTITY_A.stage, {"pairs.min_gap": 1.0}, IDENTITY_A.inputs)
    assert not (run.begin(other, resumable=True) / "shard_00000.jsonl").exists()


def test_a_training_that_was_begun_is_not_thrown_away_in_passing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    partial = run.begin(IDENTITY_A, resumable=True)
    (partial / "megatron").mkdir()
    other = Identity(IDENTITY_A.stage, {"dpo.lr": 1.0}, {})
    with pytest.raises(UserError, match=rf"another configuration.*--redo {IDENTITY_A.stage}"):
        run.begin(other, resumable=True)
    assert (run.begin(IDENTITY_A, resumable=True) / "megatron").exists()
    identity = (partial / IDENTITY).read_bytes()
    for damaged in (b"", b"7", b'["M2", 1, {}]', b"{}"):
        (partial / IDENTITY).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"has no readable {IDENTITY}.*restore that file.*--redo"):
            run.begin(IDENTITY_A, resumable=True)
    (partial / IDENTITY).write_bytes(identity)
    run.remove(IDENTITY_A.stage)
    assert run.begin(other, resumable=True).exists()


def test_another_layout_goes_on_and_the_manifest_says_which_finished(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    eight, two = (
        Identity("M2", {"dpo.beta": 0.1}, {}, {"launch.processes_per_node": processes}) for processes in (8, 2)
    )
    (run.begin(eight, resumable=True) / "megatron").mkdir()
    assert (run.begin(two, resumable=True) / "megatron").exists()
    run.commit(two, rows=1, seconds=1.0, version="0.1.0", counts={})
    manifest = run.manifest("M2")
    assert manifest is not None and manifest.layout == {"launch.processes_per_node": 2}
    assert "launch.processes_per_node" not in manifest.config


def test_a_stage_that_cannot_go_on_begins_anew(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.begin(IDENTITY_A, resumable=False) / "quarantine.jsonl").write_text("of a broken seed file\n")
    assert not (run.begin(IDENTITY_A, resumable=False) / "quarantine.jsonl").exists()


def test_a_kill_in_the_commit_loses_no_shard_and_changes_no_byte(tmp_path: Path) -> None:
    run, whole = RunDir(tmp_path / "killed"), RunDir(tmp_path / "whole")
    make_output(whole)
    partial = run.begin(IDENTITY_A, resumable=True)
    (partial / "pairs.jsonl").write_text("one\n")
    (partial / MANIFEST).write_text("{}")  # written, not renamed yet
    assert (run.begin(IDENTITY_A, resumable=True) / "pairs.jsonl").exists()
    make_output(run)
    assert run.digest("round_1/pairs") == whole.digest("round_1/pairs")


def test_checkpoints_stay_until_the_output_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before: they are there to go on from. Killed after: what is left of them goes with the next start."""
    run, identity = RunDir(tmp_path), Identity("M2", {}, {})
    checkpoint = run.begin(identity, resumable=True) / "megatron/iter_0000004/shard.distcp"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("state")
    (run.partial("M2") / "model.safetensors").write_text("weights")

    rename = os.rename

    def killed_before(source: Path, target: Path) -> None:
        if source == run.partial("M2"):
            raise KeyboardInterrupt
        rename(source, target)

    def killed_after(stage: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", killed_before)
        run.commit(identity, 1, 1.0, "0", {})
    run.begin(identity, resumable=True)
    assert checkpoint.read_text() == "state"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "remove_leftovers", killed_after)
        run.commit(identity, 1, 1.0, "0", {})
    manifest = run.manifest("M2")
    assert manifest is not None and list(manifest.files) == ["model.safetensors"]
    run.verify("M2", quick=False)
    run.remove_leftovers("M2")
    assert sorted(path.name for path in run.output("M2").iterdir()) == [MANIFEST, "model.safetensors"]


def test_a_removal_that_was_killed_does_not_stop_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    make_output(run)
    left = tmp_path / "round_1/pairs.removed"
    left.mkdir()
    (left / "rest").write_text("")
    assert run.remove("round_1/pairs") and not run.output("round_1/pairs").exists() and not left.exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    with pytest.raises(UserError, match="not empty and not a run folder"), RunDir(tmp_path).lock():
        pass
    with pytest.raises(UserError, match=r"is there without a manifest\.json"):
        RunDir(tmp_path).begin(Identity("seed", {}, {}), resumable=False)


def test_a_first_start_that_was_killed_or_had_no_room_left_starts_again(tmp_path: Path) -> None:
    """Before the folder had its config.yaml."""
    run = RunDir(tmp_path)
    (tmp_path / "attempt").mkdir()
    (tmp_path / "attempt/.config.yaml.node.7").write_text("seed: 1")
    for name in (".lock", "provenance.json", "judge_template.txt", ".config.yaml.node.7"):
        (tmp_path / name).write_text("")
    run.check_folder()
    run.begin_attempt(b"seed: 1", b"", at_once=True)
    assert run.config_file.read_bytes() == b"seed: 1"


def test_an_output_that_was_committed_in_between_is_finished(tmp_path: Path) -> None:
    """After its manifest was looked for, while a run works and its status is shown."""
    run = RunDir(tmp_path)
    make_output(run)
    run.check_unfinished(IDENTITY_A.stage)


def test_a_model_that_holds_files_named_as_ours_is_hashed(tmp_path: Path) -> None:
    """A folder is another stage's by its name, and not by what is in it."""
    run = RunDir(tmp_path)
    model = run.begin(Identity("M0", {}, {}), resumable=False) / "huggingface"
    model.mkdir()
    for name in ("model.safetensors", MANIFEST, IDENTITY):
        (model / name).write_text("{}")
    run.commit(Identity("M0", {}, {}), 0, 0.0, "test", {})
    manifest = run.manifest("M0")
    assert manifest is not None and len(manifest.files) == 3
    (run.weights("M0") / "model.safetensors").write_text("[]")
    with pytest.raises(UserError, match="was altered"):
        run.verify("M0", quick=True)


def test_a_manifest_altered_with_its_file_is_found(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    folder = make_output(run)
    (folder / "pairs.jsonl").write_text("two\n")
    manifest = (folder / MANIFEST).read_text()
    old = file_hash_of("one\n", tmp_path)
    altered = manifest.replace(old, file_hash(folder / "pairs.jsonl"))
    (folder / MANIFEST).write_text(altered)
    with pytest.raises(UserError, match="its seal is that of another content"):
        run.verify("round_1/pairs", quick=True)
    older = orjson.loads(altered) | {"seal": ""}  # as an older version wrote it
    (folder / MANIFEST).write_bytes(orjson.dumps(older))
    with pytest.raises(UserError, match="its digest is another"):
        run.verify("round_1/pairs", quick=True)


def file_hash_of(text: str, folder: Path) -> str:
    (folder / "text").write_text(text)
    return file_hash(folder / "text")


@pytest.mark.parametrize("text", ["{", "[]", '{"inputs": 5}', '{"inputs": [{}], "rows": "x", "seconds": null}'])
def test_a_broken_manifest_is_named(text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (make_output(run) / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is not a manifest"):
        run.manifest("round_1/pairs")


def test_a_file_that_is_not_in_the_manifest_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    folder = make_output(run)
    make_output(run, Identity(f"{IDENTITY_A.stage}/evaluation", {}, {}))
    begun = run.begin(Identity(f"{IDENTITY_A.stage}/sampler_weights", {}, {}), resumable=True)
    (begun / "half.jsonl").write_text("")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard/events").write_text("a log of a later attempt")
    (folder / "linked").symlink_to(tmp_path)  # as an outside model is: what is added there is others' business
    run.verify(IDENTITY_A.stage, quick=True)
    for name in ("chat_template.jinja", "huggingface/chat_template.jinja"):
        extra = folder / name
        extra.parent.mkdir(exist_ok=True)
        extra.write_text("")
        with pytest.raises(UserError, match=rf"{extra} is not in round_1/pairs/manifest\.json.*Move it away"):
            run.verify(IDENTITY_A.stage, quick=True)
        extra.unlink()


@pytest.mark.parametrize("kind", ["link", "relative link", "dangling link", "link to a file", "file", "loop"])
@pytest.mark.parametrize("partial", [False, True])
def test_redo_of_a_folder_that_is_none(tmp_path: Path, kind: str, partial: bool) -> None:
    """--redo removes a link, never what it points to, and the stage can be made again there."""
    run, moved = RunDir(tmp_path / "run"), tmp_path / "moved"
    made = run.begin(IDENTITY_A, resumable=True) if partial else make_output(run)
    (made / "kept").write_text("")
    made.rename(moved)
    match kind:
        case "link":
            made.symlink_to(moved)
        case "relative link":
            made.symlink_to(Path("../../moved"))
        case "dangling link":
            made.symlink_to(tmp_path / "gone")
        case "link to a file":
            made.symlink_to(moved / "kept")
        case "loop":
            made.symlink_to(made)
        case _:
            made.write_text("")
    if kind.endswith("link") and not kind.startswith("dangling"):
        assert partial or run.manifest(IDENTITY_A.stage) is not None
    else:
        with pytest.raises(UserError, match=rf"{made}.* --redo {IDENTITY_A.stage}, which removes "):
            run.manifest(IDENTITY_A.stage)
    said = run.remove(IDENTITY_A.stage)
    assert ("removed the link" in said and "is kept" in said) == ("l" in kind[:8] and kind != "file" and not partial)
    assert list(made.parent.iterdir()) == [] and (moved / "kept").exists()
    make_output(run)
    run.verify(IDENTITY_A.stage, quick=False)


def test_redo_removes_nothing_behind_a_link_but_a_stage_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    for name in ("M1", "M1/evaluation"):
        make_output(run, Identity(name, {}, {}))
    run.output("M1").rename(tmp_path / "moved")
    run.output("M1").symlink_to(tmp_path / "moved")
    redone = {"M1", "M1/evaluation", "M1/sampler_weights"}
    assert [run.remove(name, redone) for name in ("M1/sampler_weights", "M1/evaluation")] == ["", ""]
    assert "removed the link" in run.remove("M1", redone) and (tmp_path / "moved/evaluation" / MANIFEST).exists()
    run.output("M1").symlink_to(tmp_path / "moved")
    assert run.remove("M1/evaluation", {"M1/evaluation"}) == f"removed {run.output('M1/evaluation')}"
    assert not (tmp_path / "moved/evaluation").exists() and run.manifest("M1") is not None
    run.output("M1").unlink()
    run.output("M1").write_text("")
    run.sweep(["M1", "M1/evaluation"])
    assert run.remove("M1/evaluation", redone) == "" and run.remove("M1", redone)


def test_an_unfinished_stage_moved_and_linked_back_resumes(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    partial = run.begin(IDENTITY_A, resumable=True)
    (partial / "pairs.jsonl").write_text("one\n")
    partial.rename(tmp_path / "moved")
    partial.symlink_to(tmp_path / "moved")
    assert (run.begin(IDENTITY_A, resumable=True) / "pairs.jsonl").exists()
    run.commit(IDENTITY_A, 1, 1.0, "0", {})
    run.verify(IDENTITY_A.stage, quick=False)
    assert (tmp_path / "moved" / MANIFEST).exists()
    partial.symlink_to(tmp_path / "moved")  # of another identity it is not resumed, nor what it points to removed
    run.remove(IDENTITY_A.stage)
    partial.symlink_to(tmp_path / "moved")
    assert list(run.begin(Identity(IDENTITY_A.stage, {}, {}), resumable=True).iterdir()) == [partial / IDENTITY]
    assert (tmp_path / "moved" / MANIFEST).exists()


def test_a_run_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "there")
    with RunDir(tmp_path / "run").lock():
        pass
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(UserError, match=r"gone is a link to .*nowhere, which is not there"),
        RunDir(tmp_path / "gone").lock(),
    ):
        pass


def test_what_killed_writes_left_is_swept(tmp_path: Path) -> None:
    """Of this machine by process, of others under the lock, but for reports and jobs, which need no lock."""
    run, here = RunDir(tmp_path / "run"), os.uname().nodename
    folder = make_output(run)
    (moved := tmp_path / "moved").mkdir()
    (run.root / "M1").symlink_to(moved)
    run.jobs.mkdir()
    (tmp_path / "run/M2.removed").mkdir()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = [place / f".{name}.{here}.{process.pid}" for place in (run.root, folder, moved) for name in ("a", "b.json")]
    elsewhere = [folder / ".manifest.json.node7.12", run.root / "M2.partial/.identity.json.a.b.3"]
    alive = [folder / f".pairs.jsonl.{here}.{os.getpid()}", run.root / ".report.html.node7.12"]
    others = [run.jobs / ".run.sbatch.login1.4", run.root / ".hidden", folder / ".notes.2024"]
    (run.root / "M2.partial").mkdir()
    run.replicas.mkdir()
    for path in (*dead, *elsewhere, *alive, *others, run.replicas / "heartbeat"):
        path.write_text("")
    run.sweep(["M1", "M2", IDENTITY_A.stage])
    assert not run.replicas.exists()
    assert [path for path in (*dead, *elsewhere) if path.exists()] == []
    assert all(path.exists() for path in (*alive, *others)) and not (tmp_path / "run/M2.removed").exists()
    os.utime(alive[1], (0, 0))
    run.sweep([])
    assert not alive[1].exists()


def test_two_processes_may_remove_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a replica that ends removes files of its own while its folder is removed."""
    (tmp_path / "replicas").mkdir()
    (tmp_path / "replicas/b").touch()
    remove, calls = shutil.rmtree, list[Path]()

    def raced(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(2, "No such file or directory", str(path / "a"))
        remove(path)

    monkeypatch.setattr("srlm_mega.run.files.shutil.rmtree", raced)
    discard(tmp_path / "replicas")
    assert list(tmp_path.iterdir()) == [] and len(calls) == 2
    discard(tmp_path / "replicas")


def test_a_device_or_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    """`srlm export ... /dev/null`, as root, made a file of it for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(tmp_path / "pipe", b"told")
    assert os.read(reader, 9) == b"told" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


@pytest.mark.timing
def test_the_lock_is_free_again_after_a_kill(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from srlm_mega.run.run_dir import RunDir
with RunDir(Path({str(tmp_path)!r})).lock():
    print("locked", flush=True)
    time.sleep(60)
"""
    run = RunDir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another srlm run"), run.lock():
            pass
        holder.kill()
        holder.wait()
    with run.lock():
        pass


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    # xxh3-128 of nothing, from the xxHash specification's own test vectors
    assert file_hash(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
    assert digest_of({}) == "99aa06d3014798d86001c324468d497f"
