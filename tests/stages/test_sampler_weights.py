"""What the sampler loads in place of a Hugging Face folder: converted, proven, refused without its proof."""

import shutil
from pathlib import Path

import pytest
from places import ROOT
from sampling_run import write_model
from trtllm_commands import commands

from srlm_mega.checkpoints_conversion import calibrate as calibration
from srlm_mega.checkpoints_conversion.convert import Bar
from srlm_mega.checkpoints_conversion.engine import Runtime, read_record
from srlm_mega.checkpoints_conversion.fp8 import Amax, linear_names
from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import UserError
from srlm_mega.records import SftExample, write_jsonl
from srlm_mega.run.manifest import Identity
from srlm_mega.run.plan import Stage, find_stage, plan
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages import sampler_weights
from srlm_mega.stages.sampler_weights import loaded_folder, make_sampler_weights
from srlm_mega.stages.work import Done, Work

FP8 = ("sampler.backend=trtllm_torch", "sampler.quantization=fp8", "sampler.calibration_size=8")
ENGINE = ("sampler.backend=trtllm_engine",)


def begin(root: Path, *overrides: str) -> tuple[RunDir, Config]:
    """A run with a seed, M1 and M2."""
    config = load_config(ROOT / "launch/configs/toy_cpu.yaml", [f"run.dir={root}", *overrides])
    run = RunDir(root)
    root.mkdir()
    run.config_file.write_text(to_yaml(config))
    examples = [SftExample(f"i{number}", "ift", "list 4 animals", "dog cat", "test") for number in range(12)]
    finish(run, "seed", lambda out: write_jsonl(out / "ift.jsonl", examples))
    for model in ("M1", "M2"):
        finish(run, model, lambda out: write_model(config, out / "huggingface", toy_tokenizer()))
    return run, config


def finish(run: RunDir, stage: str, write: object) -> None:
    identity = Identity(stage, {}, {})
    write(run.begin(identity, resumable=False))  # type: ignore[operator]
    run.commit(identity, 0, 0.0, "test", {})


def make(run: RunDir, config: Config, name: str) -> Done:
    stage = find_stage(config, name)
    done: list[Done] = []
    finish(run, name, lambda out: done.append(make_sampler_weights(work_of(run, config, stage, out))))
    return done[0]


def work_of(run: RunDir, config: Config, stage: Stage, out: Path) -> Work:
    return Work(run, config, stage, out, Progress(run.progress_file(stage.name)), Samplers(config, Path("replicas")))


def ranges(value: float, seen: list[int]) -> object:
    """A stand-in of the calibration: every layer's largest input is `value`."""

    def calibrate(folder: Path, prompts: list[list[int]], bar: Bar) -> Amax:
        seen.append(len(prompts))
        return Amax(len(prompts), dict.fromkeys(linear_names(read_shape(folder)), value))

    return calibrate


def test_the_plan_has_these_stages_only_where_they_are_needed() -> None:
    base = load_config(ROOT / "launch/configs/toy_cpu.yaml", [])
    assert not any("sampler_weights" in stage.name for stage in plan(base))
    stages = {stage.name: stage for stage in plan(load_config(ROOT / "launch/configs/toy_cpu.yaml", [*FP8]))}
    names = [name for name in stages if name.endswith("sampler_weights")]
    assert names == [f"M{number}/sampler_weights" for number in range(4)]
    assert stages["M2/sampler_weights"].inputs == ("M2", "seed", "M1/sampler_weights")
    assert stages["M1/sampler_weights"].inputs == ("M1", "seed")
    for name, model in (("round_1/prompts", "M0"), ("round_2/candidates", "M2"), ("round_2/judgements", "M2")):
        assert f"{model}/sampler_weights" in stages[name].inputs
    engines = {stage.name: stage for stage in plan(load_config(ROOT / "launch/configs/toy_cpu.yaml", [*ENGINE]))}
    assert engines["M2/sampler_weights"].inputs == ("M2", "seed"), "bf16 weights have no ranges to take over"


def test_fp8_weights_are_proven_and_refused_without_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(calibration, "calibrate", ranges(3.0, seen))
    run, config = begin(tmp_path / "run", *FP8)
    done = make(run, config, "M1/sampler_weights")
    assert (seen, done.counts["calibrated"], done.counts["verified_tensors"]) == ([8], 1, 21)
    work = work_of(run, config, find_stage(config, "round_1/candidates"), tmp_path)
    folder = loaded_folder(work, "M1")
    assert folder == run.output("M1/sampler_weights") / "huggingface"
    assert (folder / "hf_quant_config.json").is_file() and (folder / "tokenizer.json").is_file()
    (folder / "proof.json").unlink()
    with pytest.raises(UserError, match=r"not verified: srlm convert verify .* --redo M1/sampler_weights"):
        loaded_folder(work, "M1")


@pytest.mark.parametrize(("now", "calibrated"), [(3.2, 0), (3.4, 1)])
def test_the_ranges_of_the_model_before_serve_while_a_probe_fits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: float, calibrated: int
) -> None:
    """1.1 times a range of 3.0 is 3.3."""
    seen: list[int] = []
    monkeypatch.setattr(calibration, "calibrate", ranges(3.0, seen))
    run, config = begin(tmp_path / "run", *FP8, "sampler.calibration_probe=2")
    make(run, config, "M1/sampler_weights")
    monkeypatch.setattr(calibration, "calibrate", ranges(now, seen))
    done = make(run, config, "M2/sampler_weights")
    assert done.counts["calibrated"] == calibrated
    assert seen == [8, 2, *([8] if calibrated else [])]
    amax = Amax.load(run.output("M2/sampler_weights") / "amax.json", read_shape(run.weights("M2")))
    assert set(amax.inputs.values()) == {now if calibrated else 3.0}


def test_an_engine_is_built_of_a_proven_checkpoint_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(tmp_path, code=0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(sampler_weights, "probe_runtime", lambda python: Runtime("1.2.1", "10.14.1", "9.0"))
    run, config = begin(tmp_path / "run", *ENGINE, "sampler.tp_size=2", "sampler.num_devices=2")
    assert make(run, config, "M1/sampler_weights").counts["verified_tensors"] == 21
    work = work_of(run, config, find_stage(config, "round_1/candidates"), tmp_path)
    record = read_record(loaded_folder(work, "M1"))
    assert (record.tp, record.limits.max_seq_len, record.limits.max_input_len) == (2, 128, 127)
    shutil.rmtree(run.output("M1/sampler_weights"))
    make(run, config, "M1/sampler_weights")
    assert (tmp_path / "log").read_text().split() == ["trtllm-build"], "the second time it is in the cache"
    assert read_record(loaded_folder(work, "M1")) == record


def test_a_model_of_the_run_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, config = begin(tmp_path / "run", *FP8)
    make(run, config, "M1/sampler_weights")
    assert "kv_cache_dtype=auto: keys and values in FP8 too" in capsys.readouterr().out
    shape = read_shape(run.weights("M1"))
    amax = Amax.load(run.output("M1/sampler_weights") / "amax.json", shape)
    assert amax.num_prompts == 8 and len(set(amax.inputs.values())) > 3
