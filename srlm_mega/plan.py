"""The stages of a run in order, and what each depends on: a stage's config and inputs decide its bytes."""

from dataclasses import dataclass
from typing import Literal

from srlm_mega.config import Config
from srlm_mega.config.knobs import keys_of
from srlm_mega.errors import UserError

TRAINER = ("run.seed", "model", "parallel", "trainer", "launch")
JUDGING = keys_of("judge", part=None)
BATCHES = keys_of("dpo", part="batches")
# Stages that only some configurations have.
ANCHORS, ANCHOR_JUDGEMENTS = "anchors", "anchor_judgements"
PREVIOUS_JUDGEMENTS, META_JUDGEMENTS = "previous_judgements", "meta_judgements"
SAMPLER = ("run.seed", "model.seq_length", "sampler", "launch.threads_per_process")
EARLY_STOPPING = (*SAMPLER, "early_stopping", "candidates.max_new_tokens")


@dataclass(frozen=True)
class Stage:
    """One stage: a process (or, `parallel`, a torchrun job) that reads its inputs and writes one output.

    `name` is the output's place in the run folder; `config` lists the sections and keys that decide its bytes.
    `samples`: it needs the sampler; `in_shards`: replicas can share its work.
    """

    name: str
    inputs: tuple[str, ...]
    config: tuple[str, ...]
    parallel: bool = False
    samples: bool = False
    in_shards: bool = False

    @property
    def trains(self) -> bool:
        """Whether it makes a model step by step: it leaves a checkpoint when it is asked to stop."""
        return self.parallel and not self.name.endswith("/reference")

    @property
    def goes_on(self) -> bool:
        """Whether it goes on with what a killed attempt left: checkpoints, shards, prompts' drafts, an evaluation's
        verdicts. Any other begins anew."""
        return self.trains or self.in_shards or self.name.endswith(("/prompts", "/evaluation"))


def plan(config: Config) -> list[Stage]:
    """M0, then M1 by supervised training, then a model per self-rewarding round."""
    model = ("model.tokenizer", "model.path", "model.vocab_size", "model.seq_length")
    outside = ("run.seed", "seed_data", "prompts.path", "judge.template", *model)
    stages = [
        Stage("seed", (), outside),
        base_model(config),
        *(sampler_weights(config, "M0") if samples_base(config) else ()),
        *first_model(config),
        *sampler_weights(config, "M1"),
        evaluation(config, 1),
        *(prompt_writer(config) if config.run.rounds else []),
    ]
    for number in range(1, config.run.rounds + 1):
        stages += self_rewarding_round(config, number)
    return stages


def base_model(config: Config) -> Stage:
    """M0: a given folder, random weights, or (toy world) pre-trained from random weights."""
    if config.pretrain is None:
        return Stage("M0", ("seed",), ("run.seed", "model"))
    return Stage("M0", ("seed",), (*TRAINER, "pretrain"), parallel=True)


def first_model(config: Config) -> list[Stage]:
    """M1: M0 trained on IFT and EFT. Where EFT is built, M0 trained on IFT alone judges ranked replies before."""
    learnt = (*TRAINER, "sft", "eft.enabled", *(EARLY_STOPPING if stops_early(config, "sft") else ()))
    first = Stage("M1", ("M0", *seed_sets(config)), learnt, parallel=True)
    if not config.builds_eft:
        return [first]
    building = (*SAMPLER, "eft", "seed_data.num_eft", "judge.template", "judge.max_new_tokens")
    return [
        Stage("sft_baseline", ("M0", "seed"), (*TRAINER, "sft"), parallel=True),
        *sampler_weights(config, "sft_baseline"),
        Stage("eft", (*loaded(config, "sft_baseline"), "seed"), building, samples=True, in_shards=True),
        first,
    ]


def eft_source(config: Config) -> str:
    """Whose output has the EFT examples."""
    return "eft" if config.builds_eft else "seed"


def seed_sets(config: Config) -> tuple[str, ...]:
    """Whose outputs have IFT and EFT."""
    return ("seed", "eft") if config.builds_eft else ("seed",)


def samples_base(config: Config) -> bool:
    """Whether M0 writes prompts, or answers them for the rejected side of pairs."""
    writes = config.prompts.generator == "self_instruct" and config.prompts.writer == "base"
    return writes or config.pairs.rejected_from == "M0"


def prompt_writer(config: Config) -> list[Stage]:
    """Another model that writes the prompts of all rounds, where there is one."""
    if config.prompts.generator == "file" or config.prompts.writer in ("base", "current"):
        return []
    return [Stage("prompt_writer", (), ("prompts.writer",)), *sampler_weights(config, "prompt_writer")]


def sampler_weights(config: Config, model: str, before: str | None = None) -> list[Stage]:
    """What the sampler loads of a model, where that is not the Hugging Face folder. FP8 ranges of the model before are
    used as long as they fit."""
    if not config.sampler.converts:
        return []
    ranges = (f"{before}/sampler_weights",) if before is not None and config.sampler.quantization is not None else ()
    return [Stage(f"{model}/sampler_weights", (model, "seed", *ranges), ("run.seed", "model", "sampler"), samples=True)]


def loaded(config: Config, model: str) -> tuple[str, ...]:
    """The inputs of a stage that samples a model."""
    return (model, f"{model}/sampler_weights") if config.sampler.converts else (model,)


def self_rewarding_round(config: Config, number: int) -> list[Stage]:
    """M(t) answers new prompts, judges its answers, and learning from its best and worst makes M(t+1)."""
    current, folder = f"M{number}", f"round_{number}"
    prompts, candidates, judgements, pairs = (
        f"{folder}/{name}" for name in ("prompts", "candidates", "judgements", "pairs")
    )
    earlier = tuple(f"round_{before}/prompts" for before in range(1, number))
    answered_by = loaded(config, current)
    judged_by = () if config.judge.backend == "random" else answered_by
    prompts_config = (*SAMPLER, "prompts", "candidates.max_new_tokens")
    judge_config = (*SAMPLER, *JUDGING, "judge.backend")
    anchors, previous = anchor_stages(config, number), previous_judge(config, number)
    beside = tuple(stage.name for stage in (*anchors, *previous))
    return [
        Stage(prompts, ("seed", *written_by(config, current), *earlier), prompts_config, samples=True),
        Stage(candidates, (prompts, *answered_by), (*SAMPLER, "candidates"), samples=True, in_shards=True),
        Stage(judgements, (candidates, "seed", *judged_by), judge_config, samples=True, in_shards=True),
        *anchors,
        *previous,
        Stage(pairs, (candidates, judgements, *beside), ("run.seed", "pairs", "judge.min_valid", "round.method")),
        health(number),
        *(learn_from_pairs if config.round.method == "dpo" else learn_from_positives)(config, number),
        *sampler_weights(config, f"M{number + 1}", before=current),
        evaluation(config, number + 1),
    ]


def written_by(config: Config, current: str) -> tuple[str, ...]:
    """Whose prompts a round has; of an outside writer's, M0's tokenizer says which leave room for an answer."""
    match config.prompts.writer:
        case "current":
            return loaded(config, current)
        case "base":
            return loaded(config, "M0") if config.prompts.generator == "self_instruct" else ("M0",)
        case _:
            return ("M0", *(loaded(config, "prompt_writer") if config.prompts.generator == "self_instruct" else ()))


def anchor_stages(config: Config, number: int) -> tuple[Stage, ...]:
    """Where rejected responses are an anchor's: it answers the round's prompts, and M(t) judges its answers too."""
    if config.pairs.rejected_from == "round":
        return ()
    current, folder, anchor = f"M{number}", f"round_{number}", config.pairs.rejected_from
    answers = f"{folder}/{ANCHORS}"
    sampled = (*SAMPLER, "candidates", "pairs.rejected_from")
    return (
        Stage(answers, (f"{folder}/prompts", *loaded(config, anchor)), sampled, samples=True, in_shards=True),
        Stage(
            f"{folder}/{ANCHOR_JUDGEMENTS}",
            (answers, "seed", *loaded(config, current)),
            (*SAMPLER, *JUDGING),
            samples=True,
            in_shards=True,
        ),
    )


def previous_judge(config: Config, number: int) -> tuple[Stage, ...]:
    """Where pairs are weighed by consistency: M(t-1) judges the round's candidates too. Round 1 has no M(t-1)."""
    if not config.pairs.consistency or number == 1:
        return ()
    folder, inputs = f"round_{number}", (f"round_{number}/candidates", "seed", *loaded(config, f"M{number - 1}"))
    return (Stage(f"{folder}/{PREVIOUS_JUDGEMENTS}", inputs, (*SAMPLER, *JUDGING), samples=True, in_shards=True),)


def health(number: int) -> Stage:
    """Figures of what the round made, before it is trained on; later models are compared with the one before."""
    models = (f"M{number}",) if number == 1 else (f"M{number}", f"M{number - 1}")
    evaluations = tuple(f"{model}/evaluation" for model in models)
    return Stage(f"round_{number}/health", (f"round_{number}/pairs", *evaluations), ("health",))


def learn_from_pairs(config: Config, number: int) -> tuple[Stage, ...]:
    """M(t+1) by DPO on the round's pairs: of responses, and where asked for of judgements."""
    current, folder = f"M{number}", f"round_{number}"
    pairs, reference, meta = f"{folder}/pairs", f"{folder}/reference", f"{folder}/{META_JUDGEMENTS}"
    inputs = (f"{folder}/candidates", f"{folder}/judgements", pairs, "seed", *loaded(config, current))
    parts = (*SAMPLER, *JUDGING, "judge.min_valid", "meta_judge")
    judged = (Stage(meta, inputs, parts, samples=True, in_shards=True),) if config.meta_judge.enabled else ()
    extra = tuple(stage.name for stage in judged)
    stops, learnt = stops_early(config, "dpo"), (*TRAINER, "dpo")
    beside = {*((eft_source(config),) if config.dpo.eft_replay > 0 else ()), *(("seed",) if stops else ())}
    return (
        *judged,
        Stage(reference, (current, pairs, *extra), (*TRAINER, *BATCHES), parallel=True),
        Stage(
            f"M{number + 1}",
            (current, pairs, *extra, reference, *sorted(beside)),
            (*learnt, *EARLY_STOPPING) if stops else learnt,
            parallel=True,
        ),
    )


def learn_from_positives(config: Config, number: int) -> tuple[Stage, ...]:
    """M(t+1) by SFT of M0 on the seed and the round's responses with a perfect score: the ablation without pairs."""
    folder = f"round_{number}"
    positives, learnt = f"{folder}/positives", (*TRAINER, "sft", "eft.enabled", "round.method")
    return (
        Stage(positives, (f"{folder}/candidates", f"{folder}/judgements"), ("run.seed", "judge.min_valid", "round")),
        Stage(f"M{number + 1}", ("M0", *seed_sets(config), positives), learnt, parallel=True),
    )


def stops_early(config: Config, kind: Literal["sft", "dpo"]) -> bool:
    """Whether this kind of training compares its checkpoints."""
    return config.early_stopping is not None and kind in config.early_stopping.stages


def evaluation(config: Config, number: int) -> Stage:
    """What M(number) writes and how it judges, on held-out data; later models are compared with M1, on demand by M1."""
    model = f"M{number}"
    by_m1 = config.evaluation.pairwise and config.evaluation.pairwise_judge is None
    judge = loaded(config, "M1") if by_m1 else ()
    against = () if number == 1 else (*judge, "M1/evaluation")
    return Stage(
        f"{model}/evaluation",
        (*loaded(config, model), "seed", *against),
        (*SAMPLER, "evaluation", "seed_data.source", "candidates.max_new_tokens", *JUDGING, "judge.min_valid"),
        samples=True,
    )


def find_stage(config: Config, name: str) -> Stage:
    """The stage of that name; UserError lists the ones there are."""
    stages = plan(config)
    for stage in stages:
        if stage.name == name:
            return stage
    raise UserError(f"no stage {name}. Stages of this run: " + ", ".join(stage.name for stage in stages))


def downstream(stages: list[Stage], name: str) -> list[str]:
    """The stage and all that is made from it."""
    doomed = [name]
    for stage in stages:
        if stage.name not in doomed and not set(stage.inputs).isdisjoint(doomed):
            doomed.append(stage.name)
    return doomed
