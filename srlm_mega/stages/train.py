"""Stages that run on all ranks: pre-training (toy world), SFT, reference log-probabilities, DPO."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from srlm_mega.chat import Chat
from srlm_mega.config.training import OptimizationConfig
from srlm_mega.errors import UserError
from srlm_mega.evaluation.health_limits import sampler_health
from srlm_mega.evaluation.logprob_difference import logprob_differences
from srlm_mega.records import Candidate, PreferencePair, ReferenceLogprobs, SftExample, read_jsonl, write_jsonl
from srlm_mega.run.plan import eft_source, stops_early
from srlm_mega.run.stage_kinds import META_JUDGEMENTS, PAIRS, POSITIVES, REFERENCE, SFT, model_name
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.base import write_random
from srlm_mega.stages.health import pass_gate, write_health
from srlm_mega.stages.pausing import train_with_pauses
from srlm_mega.stages.work import Done, Work
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.reference_logprobs import compute_reference
from srlm_mega.training.replay import num_replayed
from srlm_mega.training.split import steps_on
from srlm_mega.training.topology import Topology
from srlm_mega.training.trainer import TrainingJob, TrainingPart, TrainingSummary, train_dpo, train_sft


def pretrain(work: Work, topology: Topology) -> Done:
    """Make M0 of the toy world: random weights, then next-token training on its documents."""
    assert work.config.pretrain is not None, "M0 is parallel only when there is pre-training"
    start = work.out / "random"
    if topology.is_main:
        shutil.rmtree(start, ignore_errors=True)  # a killed attempt may have left it
        write_random(work, start)
    topology.barrier()
    result = train_on(work, topology, work.config.pretrain, start, [work.read("seed", "documents.jsonl")])
    if topology.is_main:
        shutil.rmtree(start)
    return result


def baseline(work: Work, topology: Topology) -> Done:
    """Train the SFT baseline, M0 on IFT alone, which judges the replies that EFT is built from."""
    return train_on(work, topology, work.config.sft, work.run.weights("M0"), [work.read("seed", "ift.jsonl")])


def supervised(work: Work, topology: Topology) -> Done:
    """Train M1: M0 on IFT and EFT together, with the loss on the target tokens."""
    return train_on(work, topology, work.config.sft, work.run.weights("M0"), seed_files(work))


def supervised_with_positives(work: Work, topology: Topology) -> Done:
    """Train M(t+1) of the ablation: M0 on the seed and the round's perfect responses, as they were sampled."""
    path = work.read(POSITIVES.of(work.round), "positives.jsonl")
    positives = [
        TokenSequence(one.id, one.prompt_token_ids + one.token_ids, len(one.prompt_token_ids))
        for one in read_jsonl(path, Candidate)
    ]
    return train_on(work, topology, work.config.sft, work.run.weights("M0"), seed_files(work), positives)


def train_on(
    work: Work,
    topology: Topology,
    section: OptimizationConfig,
    start: Path,
    files: Sequence[Path],
    more: Sequence[TokenSequence] = (),
) -> Done:
    """Train by SFT from the model in `start`, on files of examples and further sequences."""
    sequences, job = [*sequences_of(start, files), *more], job_of(work, topology, start)

    def train(part: TrainingPart | None) -> TrainingSummary:
        return train_sft(replace(job, part=part), section, sequences)

    if work.stage.kind is SFT and stops_early(work.config, "sft"):
        steps = steps_on(sequences, section, work.config.model.seq_length)
        return train_with_pauses(work, topology, start, steps, train)
    return done(train(None))


def job_of(work: Work, topology: Topology, start: Path) -> TrainingJob:
    """Return the stage as a job for the trainer."""
    return TrainingJob(
        topology=topology,
        config=work.config,
        start=start,
        out=work.out,
        seed=derive_seed(work.config.run.seed, work.stage.name),
        report=work.progress.update,
        stop_file=work.run.stop_file,
    )


def seed_files(work: Work) -> list[Path]:
    """Return the files of IFT and, where it is enabled, EFT examples."""
    return [work.read("seed", "ift.jsonl"), *([eft_file(work)] if work.config.eft.enabled else [])]


def eft_file(work: Work) -> Path:
    """Return the file of EFT examples: those built by stage eft, or the seed data's."""
    return work.read(eft_source(work.config), "eft_train.jsonl")


def sequences_of(start: Path, files: Sequence[Path]) -> list[TokenSequence]:
    """Read examples as token ids of the model in `start`."""
    examples = (example for file in files for example in read_jsonl(file, SftExample))
    return list(tokenized(examples, Chat.from_folder(start)))


def done(summary: TrainingSummary) -> Done:
    """Return a training's counts for the manifest."""
    counts: dict[str, float] = {
        "steps": summary.steps,
        "excluded": summary.excluded,
        "verified_tensors": summary.verified,
    }
    return Done(summary.items, counts | ({"replayed_steps": summary.replayed} if summary.replayed else {}))


def tokenized(examples: Iterable[SftExample], chat: Chat) -> Iterable[TokenSequence]:
    """Yield the prompt and target ids of each example; in a document every token after the first is a target."""
    for example in examples:
        match example.kind:
            case "document":
                yield TokenSequence(example.id, chat.document(example.completion), num_prompt=1)
            case "ift" | "eft":
                prompt = chat.prompt(example.prompt, example.system)
                yield TokenSequence(example.id, prompt + chat.completion(example.completion), len(prompt))
            case _:
                assert_never(example.kind)


def reference(work: Work, topology: Topology) -> Done:
    """Write the log-probabilities of the round's pairs under its starting model, and in `health.json` how far those of
    the sampler are from them. CannotContinue when that is beyond its limit `stop`; the files are written anyway."""
    pairs, config = read_pairs(work), work.config
    steps_on(pairs, config.dpo, config.model.seq_length)  # refused before the pass, where they fill no batch
    start, report = work.run.weights(model_name(work.round)), work.progress.update
    records = compute_reference(topology, config, start, pairs, report)
    sampled = read_jsonl(work.read(PAIRS.of(work.round), "pairs.jsonl"), PreferencePair)
    differences = logprob_differences(sampled, records)
    health = sampler_health(work.round, differences, config.health, config.logprob_precision)
    if topology.is_main:
        write_jsonl(work.out / "reference.jsonl", records)
        write_health(work, health)
        if not differences:
            print("sampler and trainer were not compared: the pairs have none of the sampler's sums", flush=True)
    topology.barrier()  # each rank ends at the gate with the same message, once the files are there
    return Done(len(pairs), {**pass_gate(work, health), "compared": len(differences)})


def preference(work: Work, topology: Topology) -> Done:
    """Train M(t+1): M(t) by DPO on the round's pairs. UserError when the reference does not belong to them."""
    check_reference(work)
    pairs = read_pairs(work)
    path = work.read(REFERENCE.of(work.round), "reference.jsonl")
    logprobs = list(read_jsonl(path, ReferenceLogprobs))
    start, config = work.run.weights(model_name(work.round)), work.config
    job = job_of(work, topology, start)
    replay = sequences_of(start, [eft_file(work)]) if config.dpo.eft_replay > 0 else []

    def train(part: TrainingPart | None) -> TrainingSummary:
        return train_dpo(replace(job, part=part), pairs, logprobs, replay)

    if stops_early(config, "dpo"):
        steps = steps_on(pairs, config.dpo, config.model.seq_length)
        return train_with_pauses(work, topology, start, steps + num_replayed(steps, config.dpo.eft_replay), train)
    return done(train(None))


def check_reference(work: Work) -> None:
    """Raise UserError unless the reference was computed with the model (and its tokenizer), the pairs and the
    seq_length that this stage trains with."""
    name = REFERENCE.of(work.round)
    manifest = work.run.manifest(name)
    assert manifest is not None, f"{name} is an input, so it is finished"
    made_with = {**manifest.inputs, "model.seq_length": manifest.config["model.seq_length"]}
    trained_with = {
        **{stage: work.run.digest(stage) for stage in manifest.inputs},
        "model.seq_length": work.config.model.seq_length,
    }
    for what, value in made_with.items():
        if trained_with[what] != value:
            raise UserError(
                f"{work.run.output(name)} was computed with another {what}: {value}, here it is {trained_with[what]}. "
                f"Compute it again: the same `srlm run` command with {work.run.redo(name)}"
            )


def read_pairs(work: Work) -> list[PairSequences]:
    """Read the round's pairs, of responses and of judgements, with the token ids as they were sampled."""

    def sequence(pair: PreferencePair, name: str, response: tuple[int, ...]) -> TokenSequence:
        return TokenSequence(f"{pair.id}/{name}", pair.prompt_token_ids + response, len(pair.prompt_token_ids))

    parts = [kind.of(work.round) for kind in (PAIRS, META_JUDGEMENTS)]
    paths = [work.read(part, "pairs.jsonl") for part in parts if part in work.stage.inputs]
    return [
        PairSequences(
            pair.id,
            chosen=sequence(pair, "chosen", pair.chosen_token_ids),
            rejected=sequence(pair, "rejected", pair.rejected_token_ids),
            consistency=pair.consistency,
        )
        for path in paths
        for pair in read_jsonl(path, PreferencePair)
    ]
