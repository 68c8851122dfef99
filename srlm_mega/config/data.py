"""Seed data, and what a round makes: prompts, candidates, judgements; what is measured."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.section import Decides, Section


class SeedDataConfig(Section, decides="output"):
    """Where IFT, EFT and the held-out sets come from."""

    source: Literal["toy_world", "oasst", "jsonl"] = Field(
        description="The toy world (with ground truth), OpenAssistant's conversation trees, or files of one's own."
    )
    path: Path | None = Field(None, description="OpenAssistant *.trees.jsonl(.gz); jsonl: supervised examples.")
    ranked_path: Path | None = Field(None, description="jsonl: preferences, for EFT and EFT-eval.")
    num_documents: int = Field(0, ge=0, description="Toy world: pre-training documents.")
    num_ift: int = Field(3200, ge=1, description="IFT examples, upper limit; paper: 3200.")
    num_eft: int = Field(1630, ge=0, description="EFT examples, each a judged reply; built ones: upper limit.")
    num_eft_sources: int = Field(0, ge=0, description="Ranked reply sets to build EFT from: upper limit.")
    num_eft_eval: int = Field(541, ge=2, description="Held-out ranked replies, counted one by one.")
    num_validation: int = Field(253, ge=1, description="Held-out prompts for early stopping.")
    num_test: int = Field(0, ge=0, description="Held-out prompts that models are compared on; 0: those of validation.")
    later_turns: bool = Field(
        True, description="OpenAssistant: EFT also from later turns, the conversation flattened into the question."
    )
    near_duplicate_rouge_l: float = Field(
        0.7, gt=0, le=1, description="A prompt with a ROUGE-L F1 above this with a drawn one is passed over."
    )


class EftConfig(Section, decides="output"):
    """Evaluation fine-tuning: M1 learns to judge as well as to answer."""

    enabled: bool = Field(True, description="false: the ablation M1' = SFT on IFT alone.")
    build: bool | None = Field(
        None,
        description="Whether an SFT baseline writes EFT by judging ranked replies, or it comes with the seed data; "
        "null: built unless the seed data has it (toy world).",
    )
    attempts: int = Field(8, ge=1, description="Judgements of each reply: tries to agree with the ranking.")
    mode: Literal["no_inversion", "strict"] = Field(
        "no_inversion",
        description="no_inversion: no worse reply scores higher, the best above the worst; strict: the whole order.",
    )
    temperature: float = Field(0.7, gt=0, description="Sampling temperature of the baseline's judgements.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the baseline's judgements, as probability mass.")
    min_examples: Annotated[int, Decides("limit")] = Field(
        1, ge=0, description="Fewer than this stop the run (exit code 3)."
    )


class PromptsConfig(Section, decides="output"):
    """New prompts of a round: Self-Instruct few-shot, then filters."""

    generator: Literal["self_instruct", "file"] = Field(
        "self_instruct",
        description="self_instruct: a model writes prompts from few-shot lists; file: they are read from path.",
    )
    writer: Path | Literal["base", "current"] = Field(
        "base", description="Which model writes: M0, M(t), or the Hugging Face folder of another one."
    )
    path: Path | None = Field(None, description="generator=file: JSONL with `instruction` or `text` per line.")
    per_round: int = Field(5000, ge=1, description="Prompts that a round needs, after filters.")
    shots_ift: int = Field(
        6, ge=0, description="IFT prompts among the few-shot examples of a list; paper and Self-Instruct: 6."
    )
    shots_generated: int = Field(
        2, ge=0, description="Generated prompts among the few-shot examples; paper and Self-Instruct: 2."
    )
    temperature: float = Field(0.6, gt=0, description="Sampling temperature of the writer; paper: 0.6.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the writer, as probability mass; paper: 0.9.")
    max_new_tokens: int = Field(1024, ge=1, description="Longest list, in tokens.")
    stop: tuple[str, ...] = Field(
        (), description="What ends the writer's list besides the end token, for a writer that goes on and on."
    )
    min_words: int = Field(4, ge=1, description="Shorter prompts are passed over, in words.")
    max_words: int = Field(150, ge=1, description="Longer prompts are passed over, in words.")
    rouge_l_max: float = Field(0.7, gt=0, le=1, description="1 keeps all but exact duplicates.")
    max_requests: int = Field(20000, ge=1, description="Stop, with a message, when this many lists did not do.")


class CandidatesConfig(Section, decides="output"):
    """N responses per prompt."""

    n: int = Field(4, ge=2, description="Responses per prompt; paper: 4.")
    temperature: float = Field(0.7, gt=0, description="Sampling temperature; paper: 0.7.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus, as probability mass; paper: 0.9.")
    max_new_tokens: int = Field(2048, ge=1, description="Longest response, in tokens; longer ones count as truncated.")


class JudgeConfig(Section, decides="output"):
    """LLM-as-a-judge: k judgements per response, averaged."""

    backend: Annotated[Literal["model", "random"], Decides("output", part="backend")] = Field(
        "model", description="random: the control without a judge."
    )
    template: Path | Literal["additive", "multiple_choice", "toy"] = Field(
        "additive",
        description="The judge's prompt: additive (the paper's, 0 to 5 points), multiple_choice, toy, or a file.",
    )
    n: int = Field(3, ge=1, description="Judgements per response; their mean is its reward; paper: 3.")
    temperature: float = Field(0.7, gt=0, description="Sampling temperature; paper: 0.7.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus, as probability mass; paper: 0.9.")
    max_new_tokens: int = Field(512, ge=1, description="Longest judgement, in tokens.")
    min_valid: Annotated[int, Decides("output", part="rewards")] = Field(
        1, ge=1, description="Fewer parsed scores than this: the response has no reward."
    )


class EvaluationConfig(Section, decides="output"):
    """What is measured after each model."""

    temperature: float = Field(0.7, gt=0, description="Sampling temperature of the sampled responses.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the sampled responses, as probability mass.")
    judge_replicates: int = Field(1, ge=1, description="Replicates of the k-sample mean on EFT-eval.")
    judge_means: tuple[PositiveInt, ...] = Field(
        (1, 3), description="Judgements per mean that the judge is measured by."
    )
    pairwise: bool = Field(False, description="Each later model's responses against M1's by a judge, in both orders.")
    pairwise_judge: PairwiseJudgeConfig | None = Field(None, description="That judge; none: M1.")
