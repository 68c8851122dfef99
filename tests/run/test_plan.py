"""The plan reads like the paper, and says what depends on what."""

import sys
from pathlib import Path

import pytest
from places import TOY

from srlm_mega.config import Config
from srlm_mega.config.compatibility import changed
from srlm_mega.config.file import load_config
from srlm_mega.config.knobs import knobs
from srlm_mega.config.rounds import PairsConfig
from srlm_mega.config.runtime import traits_of
from srlm_mega.controller.loop import stage_groups
from srlm_mega.controller.stage_process import stage_command
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import environment
from srlm_mega.launch.sampler_environment import check_sampler_environment, devices_of, sampler_process
from srlm_mega.run.identity import LAYOUT, check_all_unchanged, config_of, layout_of
from srlm_mega.run.manifest import Identity
from srlm_mega.run.plan import downstream, find_stage, plan
from srlm_mega.run.run_dir import RunDir

CONFIG = load_config(TOY)


def test_the_road() -> None:
    names = [stage.name for stage in plan(CONFIG)]
    made = ("prompts", "candidates", "judgements", "pairs", "health", "reference")
    round_1 = [f"round_1/{name}" for name in made]
    assert names[:12] == ["seed", "M0", "M1", "M1/evaluation", *round_1, "M2", "M2/evaluation"]
    assert names[-2:] == ["M3", "M3/evaluation"] and len(names) == 20


def folders(*overrides: str) -> list[str]:
    """What a run has, in order."""
    config = load_config(TOY, overrides)
    stages, made = plan(config), set[str]()
    for stage in stages:
        assert set(stage.inputs) <= made, f"{stage.name} comes before what it is made from"
        made.add(stage.name)
    return [stage.name for stage in stages]


def test_options_of_a_round_add_their_stages() -> None:
    anchored = folders("pairs.rejected_from=M1")
    place = anchored.index("round_1/prompts")
    made = ["anchors", "candidates", "judgements", "anchor_judgements", "pairs"]
    assert anchored[place + 1 : place + 6] == [f"round_1/{name}" for name in made], "M1 is loaded once"
    consistent = folders("pairs.consistency=true")
    assert "round_1/previous_judgements" not in consistent, "before M1 nobody judged"
    assert "M1" in find_stage(load_config(TOY, ["pairs.consistency=true"]), "round_2/previous_judgements").inputs
    meta = load_config(TOY, ["meta_judge.enabled=true"])
    for name in ("round_1/reference", "M2"):
        assert "round_1/meta_judgements" in find_stage(meta, name).inputs
    assert folders("meta_judge.enabled=true", "dpo.eft_replay=0.1").count("round_1/meta_judgements") == 1


def test_positives_only_starts_from_the_base_and_needs_no_reference() -> None:
    config = load_config(TOY, ["round.method=positives_sft"])
    names = folders("round.method=positives_sft")
    assert "round_1/reference" not in names and names.index("round_1/positives") < names.index("M2")
    assert find_stage(config, "M2").inputs == ("M0", "seed", "round_1/positives")
    assert find_stage(config, "M2").kind.trains and "sft.lr" in config_of(find_stage(config, "M2"), config)


def test_replay_reads_the_seed() -> None:
    assert "seed" not in find_stage(CONFIG, "M2").inputs
    assert "seed" in find_stage(load_config(TOY, ["dpo.eft_replay=0.1"]), "M2").inputs


def test_the_gate_stands_before_the_reference_and_decides_nothing_else() -> None:
    names = folders()
    assert names.index("round_1/pairs") < names.index("round_1/health") < names.index("round_1/reference")
    assert downstream(plan(CONFIG), "round_1/health") == ["round_1/health"]
    assert find_stage(CONFIG, "round_2/health").inputs == ("round_2/pairs", "M2/evaluation", "M1/evaluation")


def test_inputs_come_before_what_is_made_from_them() -> None:
    made: set[str] = set()
    for stage in plan(CONFIG):
        assert set(stage.inputs) <= made, stage.name
        made.add(stage.name)


def test_a_round_is_judged_by_its_own_model_and_the_control_by_none() -> None:
    assert "M2" in find_stage(CONFIG, "round_2/judgements").inputs
    control = load_config(TOY, ["judge.backend=random"])
    assert "M2" not in find_stage(control, "round_2/judgements").inputs


def test_redo_takes_everything_that_follows() -> None:
    doomed = downstream(plan(CONFIG), "round_2/pairs")
    assert doomed == ["round_2/pairs", "round_2/health", "round_2/reference", "M3", "M3/evaluation"]


def test_a_stage_knows_the_configuration_that_decides_its_bytes() -> None:
    values = config_of(find_stage(CONFIG, "round_1/pairs"), CONFIG)
    pairs = {f"pairs.{key}" for key in PairsConfig.model_fields if key != "min_pairs"}
    assert set(values) == {"run.seed", "judge.min_valid", "round.method"} | pairs
    assert changed({"a": 1, "b": 2}, {"a": 1, "b": 3}) == {"b": (2, 3)}


def test_where_training_runs_decides_no_bytes() -> None:
    """A finished model stays what it is when the cluster changes; what is learnt, and the sampler's threads, decide."""
    other = load_config(
        TOY, ["parallel.pipeline_model_parallel_size=1", "trainer.save_interval=7", "dpo.micro_batch_size=8"]
    )
    for name in ("M0", "M1", "round_1/reference", "M2"):
        stage = find_stage(CONFIG, name)
        assert config_of(stage, CONFIG) == config_of(stage, other), name
        assert changed(layout_of(stage, CONFIG), layout_of(stage, other))
        for key, value in (("trainer.bf16", "true"), ("model.norm_epsilon", "0.1")):
            assert changed(config_of(stage, CONFIG), config_of(stage, load_config(TOY, [f"{key}={value}"]))), (
                name,
                key,
            )
    assert layout_of(find_stage(CONFIG, "round_1/candidates"), CONFIG) == {"sampler.max_failed_share": 0.01}
    assert "launch.threads_per_process" in config_of(find_stage(CONFIG, "round_1/candidates"), CONFIG)


def test_limits_that_only_stop_a_run_may_change_on_the_way() -> None:
    """So that what a stopped run says helps: earlier rounds were finished under the old limits."""
    loosened = load_config(TOY, ["health.tie_rate.stop=0.2", "pairs.min_pairs=7", "sampler.max_failed_share=0.5"])
    for name in ("round_1/health", "round_1/pairs", "round_1/candidates", "M2"):
        assert config_of(find_stage(loosened, name), loosened) == config_of(find_stage(CONFIG, name), CONFIG)
    assert layout_of(find_stage(loosened, "round_1/health"), loosened)["health.tie_rate.stop"] == 0.2
    other = load_config(TOY, ["pairs.min_gap=0.5"])
    assert config_of(find_stage(other, "round_1/pairs"), other) != config_of(
        find_stage(CONFIG, "round_1/pairs"), CONFIG
    )


def test_an_option_that_adds_or_takes_away_an_input_is_refused(tmp_path: Path) -> None:
    """Both ways, before anything is made: M2 was trained on other data."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    more = load_config(TOY, ["meta_judge.enabled=true"])
    for config, other in ((CONFIG, more), (more, CONFIG)):
        stage = find_stage(config, "M2")
        identity = Identity("M2", config_of(stage, config), dict.fromkeys(stage.inputs, "0"))
        run.begin(identity, resumable=False)
        run.commit(identity, 0, 0.0, "test", {})
        finished = run.manifest("M2")
        assert finished is not None
        made = {"M2": finished}
        check_all_unchanged([stage], made, config, run, {})
        with pytest.raises(UserError, match=r"was made from .* would now be from .*--redo M2"):
            check_all_unchanged([find_stage(other, "M2")], made, other, run, {})
        run.remove("M2")


def test_every_layout_key_exists() -> None:
    known = {*knobs(), *Config.model_fields}
    assert [key for key in LAYOUT if key not in known] == []


def test_who_trains() -> None:
    trains = [stage.name for stage in plan(CONFIG) if stage.kind.trains]
    assert trains == ["M0", "M1", "M2", "M3"]


def test_more_rounds_change_no_finished_stage() -> None:
    longer = load_config(TOY, ["run.rounds=3"])
    for stage in plan(CONFIG):
        assert config_of(stage, CONFIG) == config_of(find_stage(longer, stage.name), longer)


def test_an_unknown_stage_is_named_with_the_ones_there_are() -> None:
    with pytest.raises(UserError, match=r"no stage M9\. Stages of this run: seed, M0, M1"):
        find_stage(CONFIG, "M9")


def test_neighbours_share_their_processes() -> None:
    stages = plan(CONFIG)
    groups = [[stage.name for stage in group] for group in stage_groups(stages, stages, CONFIG)]
    assert groups[:3] == [
        ["seed"],
        ["M0", "M1"],
        [
            "M1/evaluation",
            "round_1/prompts",
            "round_1/candidates",
            "round_1/judgements",
            "round_1/pairs",
            "round_1/health",
        ],
    ]
    assert groups[3] == ["round_1/reference", "M2"]
    without = [stage for stage in stages if stage.name != "round_1/candidates"]
    names = [[stage.name for stage in group] for group in stage_groups(stages, without, CONFIG)]
    assert ["M1/evaluation", "round_1/prompts"] in names, "a finished stage in between ends a group"


def test_command_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "srlm").touch()
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/python")
    stages, run = {stage.name: stage for stage in plan(CONFIG)}, RunDir(Path("runs/a b"))
    assert stage_command([stages["seed"]], CONFIG, run).argv == [f"{tmp_path}/srlm", "stage", "runs/a b", "seed"]
    assert stage_command([stages["M0"], stages["M1"]], CONFIG, run).argv == [
        f"{tmp_path}/srlm", "torchrun", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1", "--no-python",
        f"{tmp_path}/srlm", "stage", "runs/a b", "M0", "M1",
    ]  # fmt: skip
    assert environment({"PATH": "/bin", "OMP_NUM_THREADS": "8"}, 1, cpu=True)["OMP_NUM_THREADS"] == "1"
    assert environment({"PATH": "/bin"}, 1, cpu=True)["PATH"] == "/bin"
    own = {"GLOO_SOCKET_IFNAME": "eth1"}
    assert environment(own, 1, True, one_node=True).items() >= (own | {"NCCL_SOCKET_IFNAME": "lo"}).items()
    assert "TORCHDYNAMO_DISABLE" not in environment({}, 1, cpu=False), "on a GPU Megatron's fusions are compiled"


TENSORRT_LLM = ("sampler.backend=trtllm_torch", "sampler.device=cuda")


@pytest.fixture
def own_python(tmp_path: Path) -> str:
    """An environment with an `srlm`, as an override."""
    (tmp_path / "srlm").touch()
    return f"sampler.python={tmp_path}/python"


def devices(number: int, *overrides: str, pipeline: int = 1, backend: tuple[str, ...] = TENSORRT_LLM) -> Config:
    """A replica of so many."""
    sizes = [f"sampler.tp_size={number // pipeline}", f"sampler.pp_size={pipeline}"]
    return load_config(TOY, [*backend, *sizes, f"sampler.num_devices={number}", *overrides])


def test_the_sampler_in_an_environment_of_its_own(own_python: str, tmp_path: Path) -> None:
    assert sampler_process(devices(1, own_python), ["stage", "r", "s"]) == [f"{tmp_path}/srlm", "stage", "r", "s"]
    assert devices_of(1, devices(4)) == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert devices_of(1, devices(4, "sampler.slurm=true")) == {}


def test_the_sampler_in_a_container() -> None:
    config = devices(1, "sampler.container=image:1", 'sampler.mounts=["/models"]')
    argv = sampler_process(config, ["replica", "r", "s", "0"])
    assert argv[:2] == ["docker", "run"] and argv[-6:] == ["image:1", "srlm", "replica", "r", "s", "0"]
    assert {"--gpus=all", f"--volume={Path.cwd()}:{Path.cwd()}", "--volume=/models:/models"} <= set(argv)
    assert "--env=CUDA_VISIBLE_DEVICES" in argv and "--env=PYTHONSAFEPATH" in argv


def test_the_sampler_in_steps_of_an_allocation(
    own_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP 8 x PP 2 on nodes of 8: two nodes, a task per device, the command in the first of them only."""
    step = "sampler.slurm=true"
    argv = sampler_process(devices(16, own_python, step, pipeline=2), ["replica", "r", "s", "3"])
    assert argv[0] == "srun"
    assert argv[-6:] == ["trtllm-llmapi-launch", f"{tmp_path}/srlm", "replica", "r", "s", "3"]
    assert {"--mpi=pmix", "--nodes=2", "--ntasks=16", "--gpus-per-node=8", "--exact", "--export=ALL"} <= set(argv)
    small = sampler_process(devices(2, step, "sampler.container=i"), [])
    assert {"--nodes=1", "--ntasks=2", "--gpus-per-node=2", "--container-image=i"} <= set(small)
    by_gres = sampler_process(devices(16, own_python, step, "launch.slurm.gpu_option=gres", pipeline=2), [])
    assert "--gres=gpu:8" in by_gres and not any(word.startswith("--gpus") for word in by_gres)
    plain = sampler_process(devices(1, own_python, step, backend=()), ["stage", "r", "s"])
    assert "--mpi=pmix" not in plain and "trtllm-llmapi-launch" not in plain and "--ntasks=1" in plain
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    vllm = sampler_process(devices(4, own_python, step, backend=("sampler.backend=vllm", "sampler.device=cuda")), [])
    assert {"--nodes=1", "--ntasks=1", "--gpus-per-node=4", "--cpus-per-task=32"} <= set(vllm)
    assert "--mpi=pmix" not in vllm and "trtllm-llmapi-launch" not in vllm


def test_a_backend_that_nobody_knows_is_named() -> None:
    """It is not taken for TensorRT-LLM."""
    with pytest.raises(AssertionError, match="'other'"):
        traits_of("other")  # type: ignore[arg-type]


def test_which_stages_start_in_the_samplers_environment() -> None:
    """Those that convert; the replicas of those that sample are started there by a process that stays here."""

    def groups(*overrides: str) -> list[list[str]]:
        config = load_config(TOY, ["sampler.backend=trtllm_torch", *overrides])
        return [[stage.name for stage in group] for group in stage_groups(plan(config), plan(config), config)]

    made = ["M1/evaluation", "round_1/prompts", "round_1/candidates", "round_1/judgements", "round_1/pairs"]
    for overrides in (("sampler.container=image",), ("sampler.container=image", "sampler.num_devices=4")):
        found = groups(*overrides)
        assert [*made, "round_1/health"] in found
        assert all(len(group) == 1 for group in found if group[0].endswith("/sampler_weights"))
    converted = groups("sampler.container=image", "sampler.quantization=fp8")
    assert ["M1/sampler_weights"] in converted


def test_a_folder_that_a_container_cannot_see_is_named() -> None:
    """Docker has no such trouble with a comma."""
    options = ["sampler.container=i", 'sampler.mounts=["/data/a,b"]', "sampler.num_devices=2"]
    check_sampler_environment(load_config(TOY, options))
    with pytest.raises(UserError, match=r"sampler\.mounts: /data/a,b: a container cannot"):
        check_sampler_environment(load_config(TOY, [*options, "sampler.slurm=true"]))


def test_an_environment_without_srlm_is_named(tmp_path: Path) -> None:
    config = load_config(TOY, [f"sampler.python={tmp_path}/bin/python"])
    with pytest.raises(UserError, match="pip install --no-deps"):
        check_sampler_environment(config)
