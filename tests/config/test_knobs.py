"""Every knob says what it decides, and what is computed from that."""

import subprocess
from pathlib import Path

import orjson
import pytest
from places import CONFIGS

from srlm_mega.config import Config
from srlm_mega.config.file import leaves, load_config
from srlm_mega.config.knobs import deciding, knobs
from srlm_mega.config.section import Section
from srlm_mega.run.identity import LAYOUT, within
from srlm_mega.run.plan import BATCHES, EARLY_STOPPING, JUDGING, SAMPLER, TRAINER

# As they stood in lists of their own before knobs said it themselves: sections and keys.
REACH = {
    f"{section}.{key}"
    for section in ("early_stopping.judge", "evaluation.pairwise_judge")
    for key in (
        "endpoint",
        "api_key_variable",
        "timeout_seconds",
        "attempts",
        "concurrent_requests",
        "max_failed_share",
    )
}
LIMIT = {
    "health",
    "pairs.min_pairs",
    "eft.min_examples",
    "early_stopping.min_valid_share",
    "sampler.max_failed_share",
    "seed_data.max_unspellable",
}
TRAINING_LAYOUT = {
    "parallel",
    "launch",
    "trainer.recompute_granularity",
    "trainer.save_interval",
    "trainer.keep_checkpoints",
    "trainer.async_save",
    "trainer.start_timeout_minutes",
    "trainer.step_timeout_minutes",
    "trainer.checkpoint_timeout_minutes",
    "trainer.export_timeout_minutes",
    *(
        f"{section}.{key}"
        for section in ("pretrain", "sft", "dpo")
        for key in ("micro_batch_size", "packed_sequence_size", "packs")
    ),
}
NOTHING = {
    "run.dir",
    "run.rounds",
    "evaluation.base_model",
    "tracking",
    "runtime",
    *(
        f"sampler.{key}"  # once runtime.sampler
        for key in ("python", "container", "mounts", "num_devices", "devices_per_node", "slurm", "take_over_seconds")
    ),
}


def below(parts: set[str]) -> set[str]:
    return {key for key in knobs() if within(key, parts)}


def test_what_knobs_decide() -> None:
    assert deciding("reach") == below(REACH)
    assert deciding("limit") == below(LIMIT)
    assert deciding("layout") == below(TRAINING_LAYOUT)
    assert deciding("nothing") == below(NOTHING)
    assert deciding("output") == knobs().keys() - below(REACH | LIMIT | TRAINING_LAYOUT | NOTHING)
    assert below(set(LAYOUT)) == LAYOUT == below(REACH | LIMIT | TRAINING_LAYOUT)


def test_what_stages_read() -> None:
    assert TRAINER == ("run.seed", "model", "parallel", "trainer", "launch")
    sampled = ("judge.n", "judge.temperature", "judge.top_p", "judge.max_new_tokens")
    assert ("judge.template", "judge.max_score", *sampled) == JUDGING
    batch_keys = ("micro_batch_size", "packed_sequence_size", "packs", "global_batch_size")
    assert tuple(f"dpo.{key}" for key in batch_keys) == BATCHES
    assert SAMPLER == ("run.seed", "model.seq_length", "sampler", "launch.threads_per_process")
    assert (*SAMPLER, "early_stopping", "candidates.max_new_tokens") == EARLY_STOPPING


def test_every_knob_has_a_description() -> None:
    """One that can be read in an editor, and that is not only the name again."""
    short = [key for key, knob in knobs().items() if len((knob.description or "").split()) < 2]
    assert short == [], "unit, meaning, and what the paper has: Field(..., description=...)"
    assert len(knobs()) > 240, "the walk reaches sections in sections"


def test_a_section_that_does_not_say_what_its_knobs_decide_cannot_be() -> None:
    with pytest.raises(TypeError, match="decides"):

        class Forgotten(Section):  # type: ignore[call-arg]
            knob: int = 1


def test_the_schema_says_what_every_knob_decides(srlm: Path) -> None:
    done = subprocess.run([srlm, "config", "schema"], capture_output=True, check=True)
    schema = orjson.loads(done.stdout)
    for name, section in schema["$defs"].items():
        for key, value in section["properties"].items():
            assert ("decides" in value) != ("$ref" in str(value)), (name, key)
    assert schema["$defs"]["PairsConfig"]["properties"]["min_pairs"]["decides"] == "limit"
    assert schema["$defs"]["PairsConfig"]["properties"]["min_gap"]["decides"] == "output"


@pytest.mark.parametrize("name", ["toy_cpu", "llama2_70b_64gpu"])
def test_a_knobs_default_is_what_a_configuration_has_that_does_not_give_it(name: str) -> None:
    """In JSON's form, defaults that a section gives the one inside it included."""
    file = CONFIGS / f"{name}.yaml"
    config = load_config(file)
    given = {f"{section}.{key}" for section, values in config.model_dump(exclude_unset=True).items() for key in values}
    for key, value in leaves(config).items():
        if key in knobs() and not within(key, given):
            assert value == knobs()[key].default, key
    assert knobs()["health.tie_rate.warn"].default == 0.5
    assert knobs()["early_stopping.judge.attempts"].optional_sections == ("early_stopping",)
    assert knobs()["evaluation.pairwise_judge.attempts"].optional_sections == ("evaluation.pairwise_judge",)
    assert set(knobs()) - set(leaves(config)) <= {"launch.slurm.environment"} | {
        key for key, knob in knobs().items() if knob.optional_sections
    }
    assert Config.model_fields.keys() == {key.partition(".")[0] for key in knobs()}
