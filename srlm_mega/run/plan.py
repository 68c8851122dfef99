"""The stages of a run in order, each with the configuration and inputs that decide its bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from srlm_mega.config import Config
from srlm_mega.config.knobs import keys_of
from srlm_mega.errors import UserError
from srlm_mega.run import stage_kinds as kinds
from srlm_mega.run.stage_kinds import BEFORE_ROUNDS, OUTSIDE_ROUNDS, StageKind, model_name, model_number

TRAINER = ("run.seed", "model", "parallel", "trainer", "launch")
JUDGED_AS = ("judge.template", "judge.max_score")
JUDGING = keys_of("judge", part=None)
BATCHES = keys_of("dpo", part="batches")
SAMPLER = ("run.seed", "model.seq_length", "sampler", "launch.threads_per_process")
GIVEN_PROMPTS = replace(kinds.PROMPTS, samples=False, resumable=False)  # from a file
EARLY_STOPPING = (*SAMPLER, "early_stopping", "candidates.max_new_tokens")


@dataclass(frozen=True)
class Stage:
    """One stage: processes that read its inputs and write one output; `kind` says how.

    `subject` is its round's number (0: before the first one), or its model's name. `config` lists the sections and
    keys that decide its bytes.
    """

    kind: StageKind
    subject: int | str
    inputs: tuple[str, ...]
    config: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the stage, and path of its output in the run folder."""
        return self.kind.of(self.subject)

    @property
    def model(self) -> str:
        """Name of the model that it makes, measures or converts."""
        assert isinstance(self.subject, str), f"{self.name} belongs to a round, not to a model"
        return self.subject

    @property
    def round(self) -> int:
        """Number of its round, 0 before the first one. M(t+1), and what is made from it, belong to round t."""
        if isinstance(self.subject, int):
            return self.subject
        return 0 if self.subject in OUTSIDE_ROUNDS else model_number(self.subject) - 1


def plan(config: Config) -> list[Stage]:
    """Plan M0, then M1 by supervised training, then a model per self-rewarding round."""
    tokenizer = ("model.tokenizer", "model.path", "model.chat_template", "model.vocab_size", "model.seq_length")
    rubric = () if config.seed_data.eft_path is None else JUDGED_AS  # which those examples are filled into
    rounds = range(1, config.run.rounds + 1)
    stages = [
        Stage(kinds.SEED, 0, (), ("run.seed", "seed_data", "eft.min_examples", *rubric, *tokenizer)),
        base_model(config),
        *(new_prompts(config, t) for t in rounds if prompts_come_first(config)),
        *(sampler_weights(config, "M0") if samples_base(config) else ()),
        *((evaluation(config, "M0"),) if config.evaluation.base_model else ()),
        *first_model(config),
        *sampler_weights(config, "M1"),
        evaluation(config, "M1"),
        *(prompt_writer(config) if config.run.rounds else ()),
    ]
    for t in rounds:
        stages += self_rewarding_round(config, t)
    return stages


def prompts_come_first(config: Config) -> bool:
    """Tell whether all rounds' prompts are taken before the first training: they are in a file, which is read once, and
    too few of them show at once. (A round of a `current` writer has M(t) as input, used or not.)"""
    return config.prompts.generator == "file" and config.prompts.writer != "current"


def new_prompts(config: Config, t: int) -> Stage:
    """Plan the prompts of round t, which repeat none of an earlier round."""
    earlier = tuple(kinds.PROMPTS.of(before) for before in range(1, t))
    inputs = ("seed", *prompt_source(config, t), *earlier)
    kind = GIVEN_PROMPTS if config.prompts.generator == "file" else kinds.PROMPTS
    return Stage(kind, t, inputs, (*SAMPLER, "prompts", "candidates.max_new_tokens"))


def self_rewarding_round(config: Config, t: int) -> list[Stage]:
    """M(t) answers new prompts and judges its own answers; training on the best and the worst of them makes M(t+1)."""
    current, trained = model_name(t), model_name(t + 1)
    prompts, candidates, judgements = kinds.PROMPTS.of(t), kinds.CANDIDATES.of(t), kinds.JUDGEMENTS.of(t)
    judge = () if config.judge.backend == "random" else loaded(config, current)
    anchor, judge_of_anchor = anchor_stages(config, t)
    extra = (*judge_of_anchor, *previous_judge(config, t))
    judged = (candidates, judgements, *(stage.name for stage in (*anchor, *extra)))
    return [
        *(() if prompts_come_first(config) else (new_prompts(config, t),)),
        *anchor,  # before the stages that sample M(t), which then follow one another and load it once
        Stage(kinds.CANDIDATES, t, (prompts, *loaded(config, current)), (*SAMPLER, "candidates")),
        Stage(kinds.JUDGEMENTS, t, (candidates, "seed", *judge), (*SAMPLER, *JUDGING, "judge.backend")),
        *extra,
        Stage(kinds.PAIRS, t, judged, ("run.seed", "pairs", "judge.min_valid", "round.method")),
        health(t),
        *training(config, t),
        *sampler_weights(config, trained, before=current),
        evaluation(config, trained),
    ]


def training(config: Config, t: int) -> tuple[Stage, ...]:
    """Plan the training that makes M(t+1)."""
    match config.round.method:
        case "dpo":
            return train_on_pairs(config, t)
        case "positives_sft":
            return train_on_positives(config, t)


def base_model(config: Config) -> Stage:
    """Plan M0: a given folder, random weights, or (toy world) pre-trained from random weights."""
    if config.pretrain is None:
        return Stage(kinds.BASE, 0, ("seed",), ("run.seed", "model"))
    return Stage(kinds.PRETRAINED_BASE, 0, ("seed",), (*TRAINER, "pretrain"))


def first_model(config: Config) -> list[Stage]:
    """Plan M1: M0 trained on IFT and EFT, which is built first where it does not come with the seed."""
    training_config = (*TRAINER, "sft", "eft.enabled", *(EARLY_STOPPING if stops_early(config, "sft") else ()))
    first = Stage(kinds.SFT, 0, ("M0", *seed_sets(config)), training_config)
    return [*(eft(config) if config.builds_eft else ()), first]


def eft(config: Config) -> list[Stage]:
    """Plan EFT: M0 trained on IFT alone judges ranked replies, or their ranks alone score them."""
    match config.eft.mode:
        case "ranks":
            scoring = ("run.seed", "eft.mode", "eft.min_examples", "seed_data.num_eft", *JUDGED_AS)
            return [Stage(kinds.EFT_FROM_RANKS, 0, ("seed",), scoring)]
        case "no_inversion" | "strict":
            building = (*SAMPLER, "eft", "seed_data.num_eft", *JUDGED_AS, "judge.max_new_tokens")
            return [
                Stage(kinds.SFT_BASELINE, 0, ("M0", "seed"), (*TRAINER, "sft")),
                *sampler_weights(config, "sft_baseline"),
                Stage(kinds.EFT, 0, (*loaded(config, "sft_baseline"), "seed"), building),
            ]
        case other:
            assert_never(other)


def eft_source(config: Config) -> str:
    """Return the stage whose output has the EFT examples."""
    return "eft" if config.builds_eft else "seed"


def seed_sets(config: Config) -> tuple[str, ...]:
    """Return the stages whose outputs have IFT and EFT."""
    return ("seed", "eft") if config.builds_eft else ("seed",)


def samples_base(config: Config) -> bool:
    """Tell whether M0 writes prompts, answers them for the rejected side of pairs, or is measured."""
    writes = config.prompts.generator == "self_instruct" and config.prompts.writer == "base"
    return writes or config.pairs.rejected_from == "M0" or config.evaluation.base_model


def prompt_writer(config: Config) -> tuple[Stage, ...]:
    """Plan the outside model that writes the prompts of all rounds, where there is one."""
    if config.prompts.generator == "file" or config.prompts.writer in ("base", "current"):
        return ()
    return (Stage(kinds.PROMPT_WRITER, 0, (), ("prompts.writer",)), *sampler_weights(config, "prompt_writer"))


def sampler_weights(config: Config, of: str, before: str | None = None) -> tuple[Stage, ...]:
    """Plan the weights that the sampler loads, where they are not the Hugging Face folder. FP8 ranges of the model
    `before` are used as long as they fit."""
    if not config.sampler.converts:
        return ()
    quantized = config.sampler.quantization is not None
    ranges = (kinds.SAMPLER_WEIGHTS.of(before),) if before is not None and quantized else ()
    return (Stage(kinds.SAMPLER_WEIGHTS, of, (of, "seed", *ranges), ("run.seed", "model", "sampler")),)


def loaded(config: Config, name: str) -> tuple[str, ...]:
    """Return the inputs of a stage that samples a model."""
    return (name, kinds.SAMPLER_WEIGHTS.of(name)) if config.sampler.converts else (name,)


def prompt_source(config: Config, t: int) -> tuple[str, ...]:
    """Return the inputs that give round t its prompts. M0's tokenizer says which of a file's or an outside writer's
    leave room for an answer."""
    match config.prompts.writer:
        case "current":
            return loaded(config, model_name(t))
        case "base":
            return loaded(config, "M0") if config.prompts.generator == "self_instruct" else ("M0",)
        case _:
            return ("M0", *(loaded(config, "prompt_writer") if config.prompts.generator == "self_instruct" else ()))


def anchor_stages(config: Config, t: int) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Plan an anchor that gives the rejected responses: it answers the round's prompts, and M(t) judges its answers.
    Two empty tuples without one."""
    anchor = config.pairs.rejected_from
    if anchor == "round":
        return (), ()
    sampled, judge = (*SAMPLER, "candidates", "pairs.rejected_from"), loaded(config, model_name(t))
    return (
        (Stage(kinds.ANCHORS, t, (kinds.PROMPTS.of(t), *loaded(config, anchor)), sampled),),
        (Stage(kinds.ANCHOR_JUDGEMENTS, t, (kinds.ANCHORS.of(t), "seed", *judge), (*SAMPLER, *JUDGING)),),
    )


def previous_judge(config: Config, t: int) -> tuple[Stage, ...]:
    """Plan M(t-1)'s judgements of the round's candidates, where pairs are weighed by consistency; none in round 1."""
    if not config.pairs.weighs_consistency(t):
        return ()
    inputs = (kinds.CANDIDATES.of(t), "seed", *loaded(config, model_name(t - 1)))
    return (Stage(kinds.PREVIOUS_JUDGEMENTS, t, inputs, (*SAMPLER, *JUDGING)),)


def health(t: int) -> Stage:
    """Plan the health check of what a round made, before it is trained on; models are compared with the one before."""
    models = (model_name(t),) if t == 1 else (model_name(t), model_name(t - 1))
    return Stage(kinds.HEALTH, t, (kinds.PAIRS.of(t), *(kinds.EVALUATION.of(name) for name in models)), ("health",))


def train_on_pairs(config: Config, t: int) -> tuple[Stage, ...]:
    """Plan M(t+1) by DPO on the round's pairs: of responses and, with the meta-judge, of judgements."""
    current, pairs = model_name(t), kinds.PAIRS.of(t)
    judged = (kinds.CANDIDATES.of(t), kinds.JUDGEMENTS.of(t), pairs, "seed", *loaded(config, current))
    meta_config = (*SAMPLER, *JUDGING, "judge.min_valid", "meta_judge")
    meta = (Stage(kinds.META_JUDGEMENTS, t, judged, meta_config),) if config.meta_judge.enabled else ()
    reference = Stage(
        kinds.REFERENCE, t, (current, pairs, *(stage.name for stage in meta)), (*TRAINER, *BATCHES, "health")
    )
    stops = stops_early(config, "dpo")
    seed = {*((eft_source(config),) if config.dpo.eft_replay > 0 else ()), *(("seed",) if stops else ())}
    inputs = (*reference.inputs, reference.name, *sorted(seed))
    training_config = (*TRAINER, "dpo", *(EARLY_STOPPING if stops else ()))
    return (*meta, reference, Stage(kinds.DPO, model_name(t + 1), inputs, training_config))


def train_on_positives(config: Config, t: int) -> tuple[Stage, ...]:
    """Plan M(t+1) by SFT of M0 on the seed and the round's perfect responses: the ablation without pairs."""
    judged = (kinds.CANDIDATES.of(t), kinds.JUDGEMENTS.of(t))
    positives = Stage(kinds.POSITIVES, t, judged, ("run.seed", "judge.min_valid", "judge.max_score", "round"))
    inputs = ("M0", *seed_sets(config), positives.name)
    training_config = (*TRAINER, "sft", "eft.enabled", "round.method")
    return (positives, Stage(kinds.SFT_ON_POSITIVES, model_name(t + 1), inputs, training_config))


def stops_early(config: Config, kind: Literal["sft", "dpo"]) -> bool:
    """Tell whether this kind of training compares its checkpoints."""
    return config.early_stopping is not None and kind in config.early_stopping.stages


def evaluation(config: Config, name: str) -> Stage:
    """Plan the evaluation of a model on held-out data; later ones are compared with M1, on demand by M1."""
    by_m1 = config.evaluation.pairwise and config.evaluation.pairwise_judge is None
    against = () if name in BEFORE_ROUNDS else (*(loaded(config, "M1") if by_m1 else ()), kinds.EVALUATION.of("M1"))
    read = (*SAMPLER, "evaluation", "seed_data.source", "candidates.max_new_tokens", *JUDGING, "judge.min_valid")
    return Stage(kinds.EVALUATION, name, (*loaded(config, name), "seed", *against), read)


def find_stage(config: Config, name: str) -> Stage:
    """Return the stage of that name; UserError lists the ones there are."""
    stages = plan(config)
    for stage in stages:
        if stage.name == name:
            return stage
    raise UserError(f"no stage {name}. Stages of this run: " + ", ".join(stage.name for stage in stages))


def downstream(stages: Sequence[Stage], name: str) -> list[str]:
    """Return the names of a stage and of all that is made from it."""
    found = [name]
    for stage in stages:
        if stage.name not in found and not set(stage.inputs).isdisjoint(found):
            found.append(stage.name)
    return found
