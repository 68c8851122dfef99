"""Configuration: presets, overrides, and mistakes that must be named."""

from pathlib import Path

import pytest
import yaml
from places import CONFIGS

from srlm_mega.config import Config
from srlm_mega.config.file import apply_overrides, leaves, load_config, origins, parse_config, read_yaml, to_yaml
from srlm_mega.errors import UserError

TOY = CONFIGS / "toy_cpu.yaml"


@pytest.mark.parametrize(
    ("name", "world", "dp"),
    [
        ("toy_cpu", 2, 1),
        ("llama2_7b_8gpu", 8, 4),
        ("llama2_70b_64gpu", 64, 1),
        ("oasst_cpu", 2, 1),
        ("smollm2_cpu", 1, 1),
    ],
)
def test_presets_are_valid(name: str, world: int, dp: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.world_size, config.data_parallel_size) == (world, dp)


def test_70b_preset_is_the_papers_protocol() -> None:
    config = load_config(CONFIGS / "llama2_70b_64gpu.yaml")
    assert (config.sft.lr, config.sft.min_lr, config.sft.global_batch_size) == (5.5e-6, 1.1e-6, 16)
    assert (config.dpo.lr, config.dpo.min_lr, config.dpo.global_batch_size, config.dpo.beta) == (1e-6, 1e-7, 16, 0.1)
    assert (config.sft.hidden_dropout, config.dpo.attention_dropout) == (0.1, 0.1)
    assert (config.candidates.n, config.candidates.temperature, config.candidates.top_p) == (4, 0.7, 0.9)
    assert (config.judge.n, config.judge.temperature, config.judge.top_p) == (3, 0.7, 0.9)


def test_resolved_yaml_reads_back_equal() -> None:
    config = load_config(TOY, ["dpo.lr=3e-4"])
    assert parse_config(yaml.safe_load(to_yaml(config)), "resolved") == config


@pytest.mark.parametrize("override", ["dpo.beta=0.5", "--dpo.beta=0.5", "--beta=0.5", "beta=5e-1"])
def test_override_spellings(override: str) -> None:
    assert load_config(TOY, [override]).dpo.beta == 0.5


def test_megatron_flag_spelling() -> None:
    config = load_config(TOY, ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=1"])
    assert (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size) == (2, 1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dpo.bta=1", ["unknown key dpo.bta", "dpo.beta"]),
        ("foo.bar=1", ["unknown key foo", "Sections: run, model"]),
        ("tensor_parallel_size=2", ["unknown key tensor_parallel_size", "parallel.tensor_model_parallel_size"]),
        ("dpo.lr=fast", ["dpo.lr", "valid number", "'fast'"]),
        ("lr=1", ["several sections", "sft.lr", "dpo.lr"]),
        ("seed_data.source=oasst", ["needs seed_data.path", "eft.build needs seed_data.num_eft_sources above 0"]),
        ("seed_data.source=jsonl", ["needs seed_data.path", "needs seed_data.ranked_path"]),
        ("eft.build=true", ["eft.build needs seed_data.num_eft_sources above 0", "eft.enabled=false"]),
        ("eft.mode=ranks", ["eft.build needs seed_data.num_eft_sources above 0", "seed_data.eft_path"]),
        ("eft.mode=ranks num_eft_sources=9 eft_path=x", ["eft_path has the EFT, so none is built", "eft.mode=ranks"]),
        ("eft.build=true num_eft_sources=9 eft_path=x", ["eft_path has the EFT, so none is built", "eft.build=True"]),
        ("seed_data.eft_path=x seed_data.num_eft=0", ["seed_data.eft_path needs seed_data.num_eft above 0"]),
        ("dpo.lr", ["section.key=value"]),
        ("parallel.tensor_model_parallel_size=3", ["2 is not divisible by TP * PP 6", "2 = 0 * 6 + 2"]),
        ("parallel.data_parallel_size=4", ["TP 1 * PP 2 * DP 4 = 8, but the world size is 2"]),
        ("dpo.packed_sequence_size=200", ["200 does not hold the longest pair", "2 * (128 - 1) = 254"]),
        ("dpo.loss_type=robust", ["robust needs label_smoothing > 0"]),
        ("dpo.loss_type=ipo dpo.label_smoothing=0.1", ["sigmoid and robust, not ipo"]),
        ("dpo.loss_type=ipo pairs.consistency=true", ["pairs.consistency weighs the loss dpo.loss_type=sigmoid"]),
        ("dpo.eft_replay=0.1 seed_data.num_eft=0", ["dpo.eft_replay 0.1 needs EFT data"]),
        ("dpo.eft_replay=0.1 eft.enabled=false", ["eft.enabled is False"]),
        ("dpo.eft_replay=1", ["dpo.eft_replay", "less than 1"]),
        ("judge.backend=random pairs.rejected_from=M1", ["pairs.rejected_from needs a judge"]),
        ("round.method=positives_sft meta_judge.enabled=true", ["meta_judge.enabled is for round.method=dpo"]),
        ("pairs.rho=1.5", ["pairs.rho", "less than or equal to 1"]),
        ("pairs.rho=[]", ["pairs.rho", "at least 1 item"]),
        ("model.num_query_groups=3", ["num_attention_heads 4 is not divisible by num_query_groups 3"]),
        ("tensor_model_parallel_size=4", ["num_query_groups 2 is not divisible by TP 4"]),
        ("sft.epochs=1", ["sft: set exactly one of train_iters and epochs"]),
        ("candidates.max_new_tokens=256", ["leaves no room for a prompt"]),
        ("seed_data.source=oasst", ["seed_data.source=oasst needs seed_data.path"]),
        ("judge.max_score=10", ["1 problem(s)", "judge.template=toy gives 0 to 5 points: give your own"]),
        ("dpo.packs=0", ["dpo.packs: Input should be 'fewest' or 'auto'", "dpo.packs: Input should be greater than"]),
        ("sft.packs=auto sft.packed_sequence_size=null", ["sft.packs=auto needs sft.packed_sequence_size"]),
        ("pairs.rho={a:[1]}", ["pairs.rho: Input should be a valid number"]),
    ],
)
def test_mistakes_are_named(override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(TOY, override.split())
    for part in said:
        assert part in str(error.value)


def test_layers_must_fill_the_pipeline() -> None:
    raw = apply_overrides(
        read_yaml(TOY), ["model.num_layers=5", "--pipeline-model-parallel-size=2", "--tensor-model-parallel-size=1"]
    )
    with pytest.raises(UserError, match=r"num_layers 5 is not divisible by PP 2 \(5 = 2 \* 2 \+ 1\)"):
        parse_config(raw, "toy")


def test_every_mistake_is_listed_at_once() -> None:
    with pytest.raises(UserError, match="2 problem") as error:
        load_config(TOY, ["dpo.bta=1", "sft.lr=fast"])
    assert "dpo.bta" in str(error.value) and "sft.lr" in str(error.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("run: {dir: [\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")


def test_a_preset_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("toy_cpu")) == load_config(TOY)
    assert origins(Path("toy_cpu"), [])["dpo.train_iters"] == "toy_cpu.yaml"
    with pytest.raises(
        UserError, match=r"no configuration file toy\.yaml.* presets are .*oasst_cpu, smollm2_cpu, toy_cpu"
    ):
        load_config(Path("toy.yaml"))
    Path("toy_cpu").write_text("run: {dir: [\n")
    with pytest.raises(UserError, match="toy_cpu is not YAML"):  # a file of that name comes first
        load_config(Path("toy_cpu"))


def test_origins() -> None:
    where = origins(TOY, ["dpo.beta=0.5", "judge.min_valid=2"])
    assert where["dpo.beta"] == "override"
    assert where["judge.min_valid"] == "override"
    assert where["dpo.train_iters"] == "toy_cpu.yaml"
    assert where["dpo.adam_beta1"] == "default"
    assert where.keys() == leaves(load_config(TOY)).keys()


def test_every_key_says_what_it_is_or_has_megatrons_name() -> None:
    schema = Config.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["DpoConfig"]["properties"]["beta"]["default"] == 0.1


def test_a_section_within_a_section(tmp_path: Path) -> None:
    given = ["launch.slurm.max_restarts=4", "signal_seconds=60"]
    config = load_config(TOY, given)
    assert config.launch.slurm.max_restarts == 4 and config.launch.slurm.signal_seconds == 60
    assert leaves(config)["launch.slurm.max_restarts"] == 4
    assert origins(TOY, given)["launch.slurm.max_restarts"] == "override"
    assert origins(TOY, given)["launch.slurm.time"] == "default"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml", []) == config
    with pytest.raises(UserError, match=r"unknown key launch\.slurm\.max_restart\. Did you mean launch\.slurm\.max"):
        load_config(TOY, ["launch.slurm.max_restart=4"])


def test_former_names_are_understood_and_say_their_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once per process. Given under both names, a key is refused, with all other mistakes."""
    file = tmp_path / "old.yaml"
    file.write_text(f"{TOY.read_text()}runtime: {{sampler: {{num_devices: 3, slurm: true}}}}\n")
    config = load_config(file, ["runtime.sampler.take_over_seconds=60"])
    assert config == load_config(TOY, ["num_devices=3", "sampler.slurm=true", "take_over_seconds=60"])
    assert load_config(file, ["sampler.num_devices=4"]).sampler.num_devices == 4
    assert origins(file, [])["sampler.num_devices"] == "old.yaml"
    assert capsys.readouterr().err.splitlines() == [
        "override 'runtime.sampler.take_over_seconds=60': runtime.sampler.take_over_seconds is now "
        "sampler.take_over_seconds",
        f"{file}: runtime.sampler.num_devices is now sampler.num_devices, runtime.sampler.slurm is now sampler.slurm",
        f"{file}: runtime.sampler.slurm is now sampler.slurm",  # where the other one is overridden
    ]
    file.write_text(file.read_text().replace("\nsampler: {", "\nsampler: {num_devices: 2, batch: 1, "))
    with pytest.raises(UserError, match="2 problem") as error:
        load_config(file)
    assert "runtime.sampler.num_devices is now sampler.num_devices, which is given too" in str(error.value)
    assert "unknown key sampler.batch." in str(error.value)


@pytest.mark.parametrize(
    ("file_has", "override", "as_if"),
    [
        ("sampler: {num_devices: 3, slurm: true}", "runtime.sampler={num_devices: 4}", "num_devices=4"),
        ("sampler: {num_devices: 3}", "runtime={sampler: {num_devices: 4}}", "num_devices=4"),
        ("sampler: {num_devices: 3}", "runtime={progress_timeout_minutes: 240}", "progress_timeout_minutes=240"),
        ("sampler: {num_devices: 3}", "sampler.num_devices=4", "num_devices=4"),
        ("sampler: {}", "seed=0", "seed=0"),
    ],
)
def test_sections_under_their_former_names(file_has: str, override: str, as_if: str, tmp_path: Path) -> None:
    """An override wins, whichever names the file has; a whole section replaces that section, as it always did."""
    file = tmp_path / "old.yaml"
    file.write_text(f"{TOY.read_text()}runtime: {{{file_has}}}\n")
    assert load_config(file, [override]) == load_config(TOY, [as_if])


def test_a_whole_section_replaces_no_keys_that_came_from_another_one(tmp_path: Path) -> None:
    """`runtime.sampler` is a section of its own in a file that has it."""
    file = tmp_path / "old.yaml"
    file.write_text(f"{TOY.read_text()}runtime: {{sampler: {{num_devices: 3, slurm: true}}}}\n")
    sampler = load_config(file, ["sampler={backend: huggingface, num_devices: 2}"]).sampler
    assert (sampler.num_devices, sampler.slurm, sampler.batch_size) == (2, True, 64)
    assert load_config(TOY, ["runtime.sampler={num_devices: 4}"]).sampler.batch_size == 256, "the rest of sampler stays"
    with pytest.raises(
        UserError, match=r"unknown key runtime\.sampler\.nun_devices\. Did you mean sampler\.num_devices"
    ):
        load_config(TOY, ["runtime.sampler.nun_devices=4"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler.backend=trtllm_torch", "sampler.tp_size=4", "num_devices=6"], "num_devices 6 is not divisible"),
        (["sampler.tp_size=2", "num_devices=2"], "huggingface holds a model on one device"),
        (["sampler.backend=trtllm_torch", "sampler.tp_size=16", "num_devices=16"], "whole nodes"),
        (
            ["sampler.backend=vllm", "sampler.slurm=true", "sampler.tp_size=8", "sampler.pp_size=2", "num_devices=16"],
            r"vllm splits a model over the GPUs of one node: TP \* PP is 16, sampler.devices_per_node 8",
        ),
        (["num_devices=16"], "more than a node's 8"),
        (["sampler.python=a", "sampler.container=b"], "not both"),
    ],
)
def test_replicas_that_cannot_be(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(TOY, overrides)


@pytest.mark.parametrize(
    ("overrides", "builds"),
    [
        ([], False),
        (["eft.build=true", "seed_data.num_eft_sources=9"], True),
        (["eft.build=true", "eft.enabled=false"], False),
        (["seed_data.source=oasst", "seed_data.path=x", "seed_data.num_eft_sources=9"], True),
        (["seed_data.source=oasst", "seed_data.path=x", "eft.enabled=false"], False),
        (["seed_data.source=oasst", "seed_data.path=x", "seed_data.eft_path=y"], False),
        (["seed_data.source=oasst", "seed_data.path=x", "seed_data.eft_path=y", "eft.build=false"], False),
        (["seed_data.eft_path=y"], False),
        (["eft.mode=ranks", "seed_data.num_eft_sources=9"], True),
        (["eft.mode=ranks", "eft.build=false"], False),
        (["eft.mode=ranks", "eft.enabled=false", "seed_data.eft_path=y"], False),
    ],
)
def test_eft_is_built_where_it_does_not_come_with_the_source(overrides: list[str], builds: bool) -> None:
    assert load_config(TOY, overrides).builds_eft is builds


def test_eft_that_the_source_does_not_have_cannot_be_taken_from_it() -> None:
    with pytest.raises(UserError, match=r"seed_data\.source=oasst has no EFT of its own"):
        load_config(TOY, ["seed_data.source=oasst", "seed_data.path=x", "eft.build=false"])


def test_rho_is_a_number_or_a_value_per_round() -> None:
    """The last value of a list goes on: with [0, 0.2, 0.3] round 4 has 0.3."""
    schedule = load_config(TOY, ["pairs.rho=[0, 0.2, 0.3]"]).pairs
    assert [schedule.rho_of(number) for number in (1, 2, 3, 4)] == [0, 0.2, 0.3, 0.3]
    assert load_config(TOY, ["pairs.rho=0.2"]).pairs.rho_of(1) == 0.2 and load_config(TOY).pairs.rho_of(9) == 0
    assert load_config(TOY, ["pairs.rho=1"]).pairs.rho_of(2) == 1
