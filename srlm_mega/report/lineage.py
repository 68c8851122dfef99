"""Lineage for `srlm show`: from a preference pair back to its prompt, candidates, judgements, seeds and models."""

from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import TypeVar

from srlm_mega.data.repeats import warnings_on
from srlm_mega.errors import UserError
from srlm_mega.records import Candidate, Judgement, MetaJudgement, PreferencePair, Prompt, PromptDraft, read_jsonl
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import CANDIDATES, JUDGEMENTS, META_JUDGEMENTS, PAIRS, PROMPTS, round_folder

T = TypeVar("T")


def seed_text(folder: Path) -> str:
    """Return the counts of the seed data's source, step by step, and of EFT if it was built, as text."""
    run = RunDir(folder)
    lines = []
    for name in ("seed", "eft"):
        manifest = run.manifest(name)
        if manifest is not None:
            lines += [f"{name:<5} {step:<24} {count:>12,g}" for step, count in manifest.counts.items()]
            lines += warnings_on(manifest.counts)
    return "\n".join(lines) or f"{run.output('seed')} is not finished: `srlm run` makes it"


def pair_text(folder: Path, name: str) -> str:
    """Return everything known about a pair as text, by its id, its prompt's or a candidate's; of a prompt without a
    pair its candidates. Raise UserError for an unknown id or a damaged file."""
    run = RunDir(folder)
    rounds = list(takewhile(lambda number: run.output(JUDGEMENTS.of(number)).is_dir(), count(1)))
    for number in rounds:
        for kind in (PROMPTS, CANDIDATES, JUDGEMENTS, PAIRS):
            if run.output(kind.of(number)).is_dir():
                run.verify(kind.of(number), quick=True)
    for number in rounds:
        pairs = pairs_of(run, number)
        pair = next((one for one in pairs if one.id == name), None)
        wanted = name if pair is None else pair.chosen_id
        group = list(read(run, CANDIDATES.of(number), "candidates.jsonl", Candidate))
        prompt_id = next((one.prompt_id for one in group if wanted in (one.id, one.prompt_id)), None)
        if prompt_id is not None:
            group = [one for one in group if one.prompt_id == prompt_id]
            ids = {one.id for one in group}
            return "\n".join(describe(run, number, group, next((one for one in pairs if one.chosen_id in ids), None)))
        if run.manifest(META_JUDGEMENTS.of(number)) is not None:
            for pair in read(run, META_JUDGEMENTS.of(number), "pairs.jsonl", PreferencePair):
                if pair.id == name:
                    return "\n".join(describe_judgements(run, number, pair))
    example = next((pair.id for number in rounds for pair in pairs_of(run, number)), None)
    raise UserError(
        f"no pair {name} in {folder}, nor a prompt or a candidate of this id."
        + (f" A pair's id looks like {example}." if example else " It has no pairs yet.")
    )


def pairs_of(run: RunDir, number: int) -> list[PreferencePair]:
    """Return the pairs of a round, none of one that has no pairs yet."""
    made = run.output(PAIRS.of(number)).is_dir()
    return list(read(run, PAIRS.of(number), "pairs.jsonl", PreferencePair)) if made else []


def describe(run: RunDir, number: int, group: Sequence[Candidate], pair: PreferencePair | None) -> Iterator[str]:
    """Yield the lines about the candidates of one prompt, and the pair of two of them, if there is one."""
    prompt_id = group[0].prompt_id
    prompt = next(p for p in read(run, PROMPTS.of(number), "prompts.jsonl", Prompt) if p.id == prompt_id)
    judgements: dict[str, list[Judgement]] = {}
    for judgement in read(run, JUDGEMENTS.of(number), "judgements.jsonl", Judgement):
        judgements.setdefault(judgement.candidate_id, []).append(judgement)
    yield f"pair {'none' if pair is None else pair.id}   {round_folder(number)}"
    yield f"prompt {prompt.id} ({prompt.source}): {prompt.question}"
    for path in sorted(run.output(PROMPTS.of(number)).glob("drafts_*.jsonl")):  # none when prompts came from a file
        for draft in read_jsonl(path, PromptDraft):
            if prompt.source == f"self_instruct/{draft.id}":
                yield f"  written in draft {draft.id} (seed {draft.seed}, model {draft.model_hash}): {draft.text}"
    roles = (
        {}
        if pair is None
        else {
            pair.chosen_id: f"chosen {pair.chosen_id} score {pair.chosen_score:g}",
            pair.rejected_id: f"rejected {pair.rejected_id} score {pair.rejected_score:g}",
        }
    )
    for candidate in group:
        yield ""
        origin = f"{candidate.finish_reason}, seed {candidate.seed}, model {candidate.model_hash}"
        yield f"{roles.get(candidate.id, f'candidate {candidate.id}')} ({origin})"
        yield f"  {candidate.text}"
        for judgement in judgements.get(candidate.id, []):
            reason = "no score" if judgement.finish_reason == "stop" else "cut off, no score"
            shown = reason if judgement.score is None else f"{judgement.score:g}"
            yield f"  judged {shown}: {judgement.text}  (seed {judgement.seed}, model {judgement.model_hash})"


def describe_judgements(run: RunDir, number: int, pair: PreferencePair) -> Iterator[str]:
    """Yield the lines about a pair of judgements: the judged response, both judgements, and their comparisons."""
    judgements = {one.id: one for one in read(run, JUDGEMENTS.of(number), "judgements.jsonl", Judgement)}
    judged = judgements[pair.chosen_id].candidate_id
    yield f"pair {pair.id}   {round_folder(number)}, two judgements of candidate {judged}"
    yield f"prompt: {pair.prompt[0].content}"
    scores = {pair.chosen_id: ("chosen", pair.chosen_score), pair.rejected_id: ("rejected", pair.rejected_score)}
    for name, (role, rating) in scores.items():
        own = judgements[name]
        yield f"{role} {name} (Elo {rating:.0f}, seed {own.seed}, model {own.model_hash}): {own.text}"
    for one in read(run, META_JUDGEMENTS.of(number), "meta_judgements.jsonl", MetaJudgement):
        if one.candidate_id == judged:
            verdict = one.verdict or "no verdict"
            yield f"  {one.first_id} against {one.second_id}: {verdict}: {one.text}  (seed {one.seed})"


def read(run: RunDir, stage: str, file: str, record: type[T]) -> Iterator[T]:
    """Yield the records in a file of a stage's output."""
    return read_jsonl(run.output(stage) / file, record)
