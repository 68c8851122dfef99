"""Stage health: figures of a round's data, checked against limits before anything is trained on it. Stage reference
passes the same gate with its figures of sampler against trainer."""

from pathlib import Path

import orjson

from srlm_mega.errors import CannotContinue
from srlm_mega.evaluation.health_limits import HealthFigure, RoundHealth, pair_counts, round_health, unknown_share
from srlm_mega.evaluation.results import ModelEvaluation
from srlm_mega.records import parse_line
from srlm_mega.run.stage_kinds import EVALUATION, model_name
from srlm_mega.stages.work import Done, Work

# Each figure in words, and what helps when it is beyond its limit; causes come before what follows from them.
MEANINGS = {
    "logprob_difference_mean": (
        "nats per token between the sampler's and the trainer's log-probabilities of the same tokens, on average",
        "one of the two does not compute this model. Look for other weights in the sampler, FP8 scales that do not "
        "fit, tokens that the engine adds to a prompt (a chat template or begin token of its own), log-probabilities "
        "after temperature or top-p, a GPU that computes badly. A run with sampler.backend=huggingface tells which",
    ),
    "logprob_difference_max": (
        "nats per token between the two in one response",
        "if the mean is small, few responses are affected: look for a replica or a GPU that computes badly",
    ),
    "unknown_tokens": (
        "of the prompts' tokens are unknown to the tokenizer",
        "give the tokenizer that the model was trained with, or prompts in a language that it knows",
    ),
    "truncation": ("of the candidates were cut", "raise candidates.max_new_tokens"),
    "duplicates": ("of the candidates repeat another of their prompt", "raise candidates.temperature"),
    "judge_truncation": ("of the judgements were cut", "raise judge.max_new_tokens"),
    "parse_failure": ("of the judgements have no readable score", "read judgements.jsonl; train on (more) EFT data"),
    "tie_rate": (
        "of the prompts have no best and worst candidate",
        "raise judge.n or candidates.n, or replay EFT data",
    ),
    "score_entropy": ("bits of the scores' distribution", "the judge gives nearly one score only: replay EFT data"),
    "chosen_length": ("times the rejected responses' length", "raise pairs.rho"),
    "length_growth": ("times the previous model's length on held-out prompts", "raise pairs.rho"),
    "agreement_drop": (
        "of accuracy on EFT-eval were lost since the previous model",
        "replay EFT data (dpo.eft_replay)",
    ),
}


def check_health(work: Work) -> Done:
    """Write `health.json`. CannotContinue when a figure is beyond its limit `stop`; the file is written anyway."""
    number = work.round
    counts = pair_counts(work.run, number)
    assert counts is not None, "pairs are an input, so they are finished"
    before = None if number == 1 else read_evaluation(work, number - 1)
    now = read_evaluation(work, number)
    health = round_health(number, counts, now, before, work.config.health, unknown_share(work.run, number))
    write_health(work, health)
    return Done(0, pass_gate(work, health))


def write_health(work: Work, health: RoundHealth) -> None:
    """Write `health.json`, and print the figures beyond a limit."""
    (work.out / "health.json").write_bytes(orjson.dumps(health, option=orjson.OPT_INDENT_2))
    for key, figure in (health.beyond("stop") | health.beyond("warn")).items():
        print(in_words(key, figure), flush=True)


def pass_gate(work: Work, health: RoundHealth) -> dict[str, float]:
    """Return the figures as counts for the manifest. CannotContinue when one is beyond its limit `stop`."""
    if health.state == "stop":
        raise CannotContinue(why_stopped(health, work.out / "health.json"))
    known = {key: one.value for key, one in health.figures.items() if one.value is not None}
    return {"warnings": len(health.beyond("warn")), **known}


def read_evaluation(work: Work, number: int) -> ModelEvaluation:
    """Read the evaluation of M(number)."""
    return parse_line(ModelEvaluation, work.read(EVALUATION.of(model_name(number)), "evaluation.json").read_bytes())


def why_stopped(health: RoundHealth, file: Path) -> str:
    """Return the message for a stopped round: the figures beyond a limit, causes first, and how to continue."""
    keys = " ".join(f"health.{key}.stop=null" for key in health.beyond("stop"))
    beyond = {key: figure for key, figure in health.figures.items() if figure.state in ("warn", "stop")}
    first = " (the first may explain the others)" if len(beyond) > 1 else ""
    return (
        f"round {health.round} is not fit to be trained on ({file}){first}:\n"
        + "\n".join(f"  - {in_words(key, figure)}; {MEANINGS[key][1]}" for key, figure in beyond.items())
        + f"\nTo continue all the same: the same command with {keys}. To make the round again with other settings: in "
        "another run folder, or here by the same command with them: it names the stage to make again by --redo, and "
        "what that removes. Everything so far is kept."
    )


def in_words(key: str, figure: HealthFigure) -> str:
    """Return a figure in words: '0.312 of the judgements have no readable score (parse_failure, stop at 0.2)'."""
    limit = figure.stop if figure.state == "stop" else figure.warn
    return f"{figure.value:.3g} {MEANINGS[key][0]} ({key}, {figure.state} at {limit})"
