"""Every switch of a round on the toy world, at the smallest size at which it shows what it does.

One small M0 and M1 are made once; each test gives a copy of that run another setting and makes the stages that differ,
in this process.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson
import pytest
import torch
from places import TOY
from transformers import AutoModelForCausalLM

from srlm_mega.config import Config
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.judging.agreement import consistency
from srlm_mega.judging.scores import mean_score
from srlm_mega.judging.template import Template
from srlm_mega.judging.verdicts import Verdict
from srlm_mega.records import (
    Candidate,
    FinishReason,
    Judgement,
    MetaJudgement,
    PreferencePair,
    Prompt,
    PromptDraft,
    read_jsonl,
)
from srlm_mega.report.lineage import pair_text
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.huggingface_sampler import HuggingFaceSampler
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages import meta_judge as meta
from srlm_mega.stages.run_stages import run_stage

pytestmark = [pytest.mark.extra, pytest.mark.slow]

SMALL = [
    "run.rounds=2",
    "seed_data.num_documents=3000",
    "seed_data.num_ift=200",
    "seed_data.num_eft=200",
    "seed_data.num_eft_eval=80",
    "seed_data.num_validation=20",
    "pretrain.train_iters=150",
    "sft.train_iters=60",
    "dpo.train_iters=6",
    "dpo.global_batch_size=8",
    "prompts.per_round=40",
    "evaluation.judge_replicates=1",
    "tracking.tensorboard=false",
    "model.max_position_embeddings=512",
    "parallel.pipeline_model_parallel_size=1",
    "launch.processes_per_node=1",
]
FIRST_ROUND = ("round_1/prompts", "round_1/candidates", "round_1/judgements")


class Run:
    """A run of this process."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.config: Config = load_config(TOY, [f"run.dir={folder}", *SMALL, *overrides])
        self.folder = RunDir(folder)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(self.config))

    def make(self, *names: str) -> "Run":
        """Stages, one after another."""
        for name in names:
            self.folder.remove(name)
            assert (
                run_stage(self.folder, Samplers(self.config, self.folder.replicas), find_stage(self.config, name)) == 0
            ), name
        return self

    def refused(self, name: str) -> tuple[int, str]:
        """Exit code and message of a stage that does not come to its end."""
        code = run_stage(self.folder, Samplers(self.config, self.folder.replicas), find_stage(self.config, name))
        return code, read_progress(self.folder.progress_file(name)).message

    def counts(self, name: str) -> dict[str, float]:
        manifest = self.folder.manifest(name)
        assert manifest is not None
        return dict(manifest.counts)

    def rows(self, stage: str, kind: type[Any], file: str | None = None) -> list[Any]:
        return list(read_jsonl(self.folder.output(stage) / (file or f"{stage.rpartition('/')[2]}.jsonl"), kind))

    def steps(self, model: str) -> list[dict[str, float]]:
        """Of a model's metrics.jsonl."""
        path = self.folder.output(model) / "metrics.jsonl"
        return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """M1, and what it wrote and judged in round 1."""
    run = Run(tmp_path_factory.mktemp("base") / "run")
    return run.make("seed", "M0", "M1", "M1/evaluation", *FIRST_ROUND, "round_1/pairs")


@pytest.fixture
def other(base: Run, tmp_path: Path) -> Callable[..., Run]:
    """A copy of the base with other settings."""

    def copy(*overrides: str) -> Run:
        shutil.copytree(base.folder.root, tmp_path / "run", dirs_exist_ok=True)
        return Run(tmp_path / "run", *overrides)

    return copy


def test_without_eft_the_judge_fails_and_pairs_vanish(other: Callable[..., Run]) -> None:
    """As in the paper, where the same prompts gave 541 pairs in place of 3,964. The toy's base model has read reviews,
    so M1' = SFT on IFT alone forgets them only with a large learning rate; M1, trained with the same, does not."""

    def made(*overrides: str) -> tuple[int, float, int]:
        """Examples that M1 learnt from, share of judgements without a score, pairs."""
        run = other("sft.train_iters=120", "sft.lr=3e-3", *overrides).make("M1", *FIRST_ROUND)
        counts, examples = run.counts("round_1/judgements"), run.folder.manifest("M1")
        assert examples is not None
        run.folder.remove("round_1/pairs")
        code = run_stage(run.folder, Samplers(run.config, run.folder.replicas), find_stage(run.config, "round_1/pairs"))
        assert code in (0, 3), "without any pair the run stops"
        pairs = 0 if code else len(run.rows("round_1/pairs", PreferencePair))
        return examples.rows, counts["unparsed"] / len(run.rows("round_1/judgements", Judgement)), pairs

    (with_eft, parse_failure, pairs), (without_eft, more_failures, fewer_pairs) = made(), made("eft.enabled=false")
    assert (with_eft, without_eft) == (400, 200)
    assert parse_failure < 0.1 and more_failures > 0.5
    assert fewer_pairs < pairs / 2


def test_length_control_chooses_shorter_and_rejects_longer(base: Run, other: Callable[..., Run]) -> None:
    controlled = other("pairs.rho=0.4").make("round_1/pairs").counts("round_1/pairs")
    plain = base.counts("round_1/pairs")
    assert controlled["mean_chosen_length"] < plain["mean_chosen_length"]
    assert controlled["mean_rejected_length"] > plain["mean_rejected_length"]
    assert controlled["pairs"] == plain["pairs"] and 0 < controlled["mean_gap"] < plain["mean_gap"]


def test_a_schedule_begins_with_its_first_round(base: Run, other: Callable[..., Run]) -> None:
    scheduled = other("pairs.rho=[0, 0.4]").make("round_1/pairs")
    pairs = "round_1/pairs"
    assert scheduled.rows(pairs, PreferencePair) == base.rows(pairs, PreferencePair), "round 1 is the paper's"


def test_a_gap_drops_close_pairs(base: Run, other: Callable[..., Run]) -> None:
    strict = other("pairs.min_gap=1.5").make("round_1/pairs")
    gaps = [pair.chosen_score - pair.rejected_score for pair in base.rows("round_1/pairs", PreferencePair)]
    assert strict.counts("round_1/pairs")["pairs"] == sum(gap > 1.5 + 1e-6 for gap in gaps) < len(gaps)


def test_anchored_rejection_takes_another_models_answers(other: Callable[..., Run]) -> None:
    """M0, which knows no [INST], answers badly: gaps are wide, and every rejected answer is its."""
    run = other("pairs.rejected_from=M0")
    run.make("round_1/anchors", "round_1/anchor_judgements", "round_1/pairs")
    anchors = {one.id for one in run.rows("round_1/anchors", Candidate, "candidates.jsonl")}
    own = {one.id for one in run.rows("round_1/candidates", Candidate)}
    pairs = run.rows("round_1/pairs", PreferencePair)
    assert pairs and {pair.rejected_id for pair in pairs} <= anchors and {pair.chosen_id for pair in pairs} <= own
    assert {one.model_hash for one in run.rows("round_1/anchors", Candidate, "candidates.jsonl")} == {
        run.folder.digest("M0")
    }


def test_prompts_by_the_model_itself(base: Run, other: Callable[..., Run]) -> None:
    """Of each round's own model: M1's in round 1, M2's in round 2; the fixed writer is M0."""
    run = other("prompts.writer=current").make("round_1/prompts", "round_1/candidates", "round_1/judgements")
    run.make("round_1/pairs", "round_1/reference", "M2", "round_2/prompts")
    assert written_by(base, 1) == {base.folder.digest("M0")}
    assert written_by(run, 1) == {run.folder.digest("M1")} and written_by(run, 2) == {run.folder.digest("M2")}
    first, second = ({one.text for one in run.rows(f"round_{number}/prompts", Prompt)} for number in (1, 2))
    assert len(first) == len(second) == 40 and not first & second, "what one round asked the next does not ask again"
    assert first != {one.text for one in base.rows("round_1/prompts", Prompt)}


def written_by(run: Run, number: int) -> set[str]:
    """Digests of the models that drafted a round's prompts."""
    folder = run.folder.output(f"round_{number}/prompts")
    return {draft.model_hash for path in folder.glob("drafts_*.jsonl") for draft in read_jsonl(path, PromptDraft)}


def test_positives_only_adds_perfect_answers_to_the_seed(base: Run, other: Callable[..., Run]) -> None:
    """The best of M1's answers by the same judge; SFT of M0 on 400 seed examples and them."""
    run = other("round.method=positives_sft", "sft.train_iters=8").make("round_1/positives", "M2")
    scores: dict[str, list[float | None]] = {}
    for judgement in base.rows("round_1/judgements", Judgement):
        scores.setdefault(judgement.candidate_id, []).append(judgement.score)
    perfect = {name for name, one in scores.items() if mean_score(one, 1) == 5}
    positives = run.rows("round_1/positives", Candidate)
    assert positives and {one.id for one in positives} <= perfect
    manifest = run.folder.manifest("M2")
    assert manifest is not None and manifest.rows == 400 + len(positives)
    assert "rewards/margins" not in run.steps("M2")[0], "no preference loss"
    few = other("round.method=positives_sft", "round.max_positives=2").make("round_1/positives")
    assert len(few.rows("round_1/positives", Candidate)) == 2


def test_replay_mixes_eft_steps_into_dpo(other: Callable[..., Run]) -> None:
    """Six DPO steps and, for a quarter of all, two of EFT: the third and the seventh... of eight, evenly."""
    run = other("dpo.eft_replay=0.25").make("round_1/pairs", "round_1/reference", "M2")
    replayed = [step["step"] for step in run.steps("M2") if "eft_replay/loss" in step]
    dpo = [step for step in run.steps("M2") if "rewards/margins" in step]
    assert replayed == [4, 8] and len(dpo) == 6 and run.counts("M2")["replayed_steps"] == 2
    assert dpo[0]["loss"] == pytest.approx(0.693147, abs=1e-4), "the reference is the round's start all the same"
    rates = [step["learning_rate"] for step in run.steps("M2")]
    assert rates[0] == pytest.approx(8e-5) and rates[-1] == pytest.approx(8e-6), "the schedule spans all eight"
    first = run.steps("M2")[3]["eft_replay/loss"]
    assert 0 < first < 2, "the mean -log p of judgements by a model that was trained on them"


def test_consistency_weighs_each_pair_by_its_own_prompt(other: Callable[..., Run]) -> None:
    """Round 2: M1 judges M2's answers beside M2. The weights again, from the files, by id."""
    run = other("pairs.consistency=true").make("round_1/pairs", "round_1/reference", "M2", "M2/evaluation")
    run.make("round_2/prompts", "round_2/candidates", "round_2/judgements", "round_2/previous_judgements")
    run.make("round_2/pairs", "round_2/reference", "M3")
    by_judge = [
        means(run.rows(f"round_2/{name}", Judgement, "judgements.jsonl"))
        for name in ("judgements", "previous_judgements")
    ]
    candidates = run.rows("round_2/candidates", Candidate)
    pairs = run.rows("round_2/pairs", PreferencePair)
    by_prompt = {prompt: [one.id for one in own] for prompt, own in groupby(candidates, lambda one: one.prompt_id)}
    for pair in pairs:
        own = by_prompt[pair.id.removesuffix("-pair")]
        assert pair.consistency == pytest.approx(consistency(*([judge[name] for name in own] for judge in by_judge)))
    assert len({pair.consistency for pair in pairs}) > 3, "judges of different models rank differently"
    assert run.counts("round_2/pairs")["mean_consistency"] == pytest.approx(fmean(one.consistency for one in pairs))
    assert {one.model_hash for one in run.rows("round_2/previous_judgements", Judgement, "judgements.jsonl")} == {
        run.folder.digest("M1")
    }
    assert run.steps("M3")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    losses = [step["loss"] for step in run.steps("M3")]
    certain = Run(run.folder.root, "pairs.consistency=false").make("round_2/pairs", "round_2/reference", "M3")
    assert [step["loss"] for step in certain.steps("M3")][1:] != losses[1:], "the weights reach the loss"


def means(judgements: list[Judgement]) -> dict[str, float]:
    scores: dict[str, list[float | None]] = {}
    for one in judgements:
        scores.setdefault(one.candidate_id, []).append(one.score)
    return {name: mean for name, own in scores.items() if (mean := mean_score(own, 1)) is not None}


@contextmanager
def a_judge_of_judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy model compares nothing: a prompt of its words, and of every answer a verdict."""

    def verdict(text: str, finish_reason: FinishReason) -> Verdict | None:
        return ("first", "second", None)[len(text.split()) % 3]  # type: ignore[return-value]

    short = Template.from_text("{{instruction}} {{response}} {{first}} {{second}}", "test", PLACES)
    with monkeypatch.context() as patch:
        patch.setattr(meta, "meta_template", lambda: short)
        patch.setattr(meta, "verdict_of", verdict)
        yield


PLACES = ("instruction", "response", "first", "second")


def test_the_meta_judges_pairs_join_the_rounds(other: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = other("meta_judge.enabled=true", "meta_judge.max_share=0.2").make("round_1/pairs")
    with a_judge_of_judges(monkeypatch):
        run.make("round_1/meta_judgements")
    pairs = run.rows("round_1/meta_judgements", PreferencePair, "pairs.jsonl")
    own = len(run.rows("round_1/pairs", PreferencePair))
    assert 0 < len(pairs) <= 0.2 * (own + len(pairs))
    judgements = {one.id: one for one in run.rows("round_1/judgements", Judgement)}
    for pair in pairs:
        assert pair.chosen_token_ids == judgements[pair.chosen_id].token_ids, "as it was sampled"
        assert pair.chosen_score > pair.rejected_score and pair.prompt[0].content.startswith("review ")
        assert judgements[pair.chosen_id].candidate_id == judgements[pair.rejected_id].candidate_id
    battles = run.rows("round_1/meta_judgements", MetaJudgement)
    asked = {(one.first_id, one.second_id) for one in battles}
    assert {(second, first) for first, second in asked} == asked, "both orders"
    shown = pair_text(run.folder.root, pairs[0].id)
    assert pairs[0].prompt[0].content in shown and f"rejected {pairs[0].rejected_id} (Elo" in shown
    run.make("round_1/reference", "M2")
    manifest = run.folder.manifest("M2")
    assert manifest is not None and manifest.rows == own + len(pairs)


def test_a_meta_judge_that_cannot_judge_changes_nothing(other: Callable[..., Run]) -> None:
    """The shipped template is longer than the toy's sequences: nothing is asked or cut, and the round goes on."""
    run = other("meta_judge.enabled=true").make("round_1/pairs", "round_1/meta_judgements")
    counts = run.counts("round_1/meta_judgements")
    assert counts["pairs"] == 0 and counts["too_long"] > 0 and counts["responses"] > 0


def test_a_judge_prompt_it_was_not_trained_on_judges_worse(base: Run, other: Callable[..., Run]) -> None:
    """As the multiple-choice prompt of the paper's table 5 does. It needs longer sequences than the toy's, and its
    words are unknown to the toy's tokenizer."""
    run = other("judge.template=multiple_choice", "model.seq_length=512")
    run.make("seed")
    template = (run.folder.output("seed") / "judge_template.txt").read_text(encoding="utf-8")
    assert template.startswith("A user gave an instruction") and "{{response}}" in template
    judged = run.make("round_1/judgements").counts("round_1/judgements")
    assert judged["unparsed"] > base.counts("round_1/judgements")["unparsed"]


def test_the_gate_stops_a_round_and_says_how_to_go_on(other: Callable[..., Run]) -> None:
    run = other("health.score_entropy.stop=2.59", "health.tie_rate.stop=0.99")
    code, message = run.refused("round_1/health")
    assert code == 3 and "score_entropy, stop at 2.59" in message and "tie_rate" not in message
    assert "health.score_entropy.stop=null" in message and "--redo" in message
    kept = run.folder.partial("round_1/health") / "health.json"
    assert str(kept) in message and orjson.loads(kept.read_bytes())["state"] == "stop"
    assert run.folder.manifest("round_1/health") is None, "so that the run does not go on"
    healthy = Run(run.folder.root, "health.tie_rate.stop=0.99").make("round_1/health")
    found = orjson.loads((healthy.folder.output("round_1/health") / "health.json").read_bytes())
    assert found["figures"]["score_entropy"]["state"] == "fine" and healthy.counts("round_1/health")["warnings"] == 0


def test_dropout_is_on_in_training_and_off_in_the_reference(other: Callable[..., Run]) -> None:
    """Measured: the same model and pairs with dropout 0.1 and 0. The reference's log-probabilities are the same bits;
    the first loss is ln 2 without dropout and something else with it."""
    made = {}
    for share in (0.0, 0.1):
        run = other(f"dpo.hidden_dropout={share}", f"dpo.attention_dropout={share}", "dpo.train_iters=1")
        run.make("round_1/pairs", "round_1/reference", "M2")
        reference = (run.folder.output("round_1/reference") / "reference.jsonl").read_bytes()
        made[share] = reference, run.steps("M2")[0]
    assert made[0.0][0] == made[0.1][0]
    assert made[0.0][1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert made[0.0][1]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(made[0.1][1]["loss"] - 0.693147) > 1e-3 and abs(made[0.1][1]["rewards/margins"]) > 1e-3


def test_dropout_is_off_in_generation(base: Run, tmp_path: Path) -> None:
    """A folder that asks for dropout 0.9 is sampled as one that asks for none; in training mode it would not be."""
    folder = shutil.copytree(base.folder.weights("M1"), tmp_path / "model")
    settings = orjson.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(orjson.dumps(settings | {"attention_dropout": 0.9}))
    candidates = base.rows("round_1/candidates", Candidate)
    prompts = [one.prompt_token_ids for one in candidates[::4]]
    greedy = SamplingParams(1, 0.0, 1.0, 12, seed=0)
    ends = candidates[0].token_ids[-1:]
    texts = [
        [one.token_ids for (one,) in HuggingFaceSampler(path, ends, "cpu", 16).sample(prompts, greedy)]
        for path in (base.folder.weights("M1"), folder)
    ]
    assert texts[0] == texts[1]
    model, inputs = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([prompts[0]])
    with torch.no_grad():
        evaluated, trained = model.eval()(inputs).logits, model.train()(inputs).logits
    assert (evaluated - trained).abs().max() > 1e-2, "the check would see dropout"
