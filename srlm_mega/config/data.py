"""Seed data; prompts, candidates and judgements of a round; evaluation."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.section import Decides, Section


class SeedDataConfig(Section, decides="output"):
    """Source of IFT, EFT and the held-out sets."""

    source: Literal["toy_world", "oasst", "jsonl"] = Field(
        description="The toy world (with ground truth), OpenAssistant's trees (oasst), or your own files (jsonl)."
    )
    path: Path | None = Field(
        None, description="OpenAssistant's *.trees.jsonl(.gz), or supervised examples (jsonl): a file or a folder."
    )
    ranked_path: Path | None = Field(
        None, description="Preferences for EFT and EFT-eval (source=jsonl): a file or a folder."
    )
    eft_path: Path | None = Field(
        None,
        description="Your own examples of judging (JSONL), in place of EFT that is built or comes with the source.",
    )
    strip_template: bool = Field(
        False, description="Take the marks of a chat template ([INST], <|im_start|>, ...) off the texts of your files."
    )
    max_unspellable: Annotated[float, Decides("limit")] = Field(
        0.05, ge=0, le=1, description="Largest share of texts that the tokenizer cannot give back; more stop the run."
    )
    num_documents: int = Field(0, ge=0, description="Pre-training documents of the toy world.")
    num_ift: int = Field(3200, ge=1, description="Largest number of IFT examples; paper: 3200.")
    num_eft: int = Field(1630, ge=0, description="Largest number of EFT examples, each a judged reply; paper: 1630.")
    num_eft_sources: int = Field(0, ge=0, description="Largest number of prompts whose ranked replies give EFT.")
    num_eft_eval: int = Field(
        541, ge=2, description="Held-out ranked replies (EFT-eval), counted one by one; paper: 541."
    )
    num_validation: int = Field(253, ge=1, description="Number of held-out prompts for early stopping; paper: 253.")
    num_test: int = Field(0, ge=0, description="Held-out prompts that models are compared on; 0: the validation set.")
    later_turns: bool = Field(
        True, description="Take EFT from later turns of OpenAssistant's trees too, flattened into one question."
    )
    near_duplicate_rouge_l: float = Field(
        0.7,
        gt=0,
        le=1,
        description="ROUGE-L F1 with a prompt already drawn, by words of any script, above which a prompt is left out.",
    )


class EftConfig(Section, decides="output"):
    """Evaluation fine-tuning: M1 is trained to judge as well as to answer."""

    enabled: bool = Field(True, description="Train M1 on EFT too; false: the ablation, SFT on IFT alone.")
    build: bool | None = Field(
        None,
        description="Build EFT from ranked replies, as eft.mode says; false: EFT comes with the seed data; "
        "null: built unless the seed data has it (toy world, seed_data.eft_path), and always with eft.mode=ranks.",
    )
    attempts: int = Field(8, ge=1, description="Judgements per ranked reply: tries to agree with the ranking.")
    mode: Literal["no_inversion", "strict", "ranks"] = Field(
        "no_inversion",
        description="Judgements of an SFT baseline that agree with the ranking (no_inversion: no worse reply scores "
        "higher, the best above the worst; strict: the whole order), or ranks: scores from the ranks, 5 for the best "
        "to 1 for the worst reply, without reasons and without a baseline.",
    )
    temperature: float = Field(0.7, gt=0, description="Sampling temperature of the SFT baseline's judgements.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the SFT baseline's judgements, as probability mass.")
    min_examples: Annotated[int, Decides("limit")] = Field(
        1, ge=0, description="Smallest number of EFT examples; fewer stop the run (exit code 3)."
    )


class PromptsConfig(Section, decides="output"):
    """New prompts of a round: few-shot lists (Self-Instruct), then filters."""

    generator: Annotated[Literal["self_instruct", "file"], Decides("output", by_round=True)] = Field(
        "self_instruct",
        description="Source of new prompts: self_instruct (a model continues few-shot lists; its rules of form are for "
        "English) or file (read from path); a further round may have the other one.",
    )
    writer: Path | Literal["base", "current"] = Field(
        "base", description="Model that writes: base (M0), current (M(t)), or the Hugging Face folder of another one."
    )
    path: Annotated[Path | None, Decides("output", by_round=True)] = Field(
        None,
        description="File or folder of prompts (generator=file): lines with `text`, `prompt` or `instruction`, or "
        "plain text with one per line; a further round may take another.",
    )
    per_round: int = Field(5000, ge=1, description="Number of prompts that a round needs, after filters.")
    shots_ift: int = Field(6, ge=0, description="IFT prompts among the few-shot examples; paper: 6.")
    shots_generated: int = Field(2, ge=0, description="Generated prompts among the few-shot examples; paper: 2.")
    temperature: float = Field(0.6, gt=0, description="Sampling temperature of the writer; paper: 0.6.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the writer, as probability mass; paper: 0.9.")
    max_new_tokens: int = Field(1024, ge=1, description="Longest list that the writer may write, in tokens.")
    stop: tuple[str, ...] = Field(
        (), description="Texts that end a list besides the end token, for a writer that does not stop by itself."
    )
    min_words: int = Field(4, ge=1, description="Shortest prompt that self_instruct keeps, in words.")
    max_words: int = Field(150, ge=1, description="Longest prompt that self_instruct keeps, in words.")
    rouge_l_max: float = Field(
        0.7, gt=0, le=1, description="Largest ROUGE-L F1 with a kept prompt; 1: drop exact copies."
    )
    max_requests: int = Field(20000, ge=1, description="Largest number of lists; too few prompts by then stop the run.")


class CandidatesConfig(Section, decides="output"):
    """Candidates: several sampled responses per prompt."""

    n: int = Field(4, ge=2, description="Number of responses per prompt; paper: 4.")
    temperature: float = Field(0.7, gt=0, description="Sampling temperature; paper: 0.7.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus, as probability mass; paper: 0.9.")
    max_new_tokens: int = Field(2048, ge=1, description="Longest response, in tokens; one cut off there is truncated.")


class JudgeConfig(Section, decides="output"):
    """LLM-as-a-judge: the mean score of several judgements per response."""

    backend: Annotated[Literal["model", "random"], Decides("output", part="backend")] = Field(
        "model", description="Judge of the candidates: model (M(t) itself), or random, the control without a judge."
    )
    template: Annotated[
        Path | Literal["additive", "multiple_choice", "score_only", "toy"], Decides("output", by_round=True)
    ] = Field(
        "additive",
        description="Prompt of the judge: additive (the paper's, 0 to 5 points), multiple_choice, score_only (no "
        "reasons: an answer of a few tokens), toy, or a file; a further round may take another.",
    )
    max_score: int = Field(
        5,
        ge=1,
        le=100,
        description="Largest score that a template of your own asks for; the smallest is 0.",
    )
    n: int = Field(3, ge=1, description="Number of judgements per response, whose mean score is the reward; paper: 3.")
    temperature: float = Field(0.7, gt=0, description="Sampling temperature; paper: 0.7.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus, as probability mass; paper: 0.9.")
    max_new_tokens: int = Field(512, ge=1, description="Longest judgement, in tokens.")
    min_valid: Annotated[int, Decides("output", part="rewards")] = Field(
        1, ge=1, description="Smallest number of readable scores; with fewer the response has no reward."
    )


class EvaluationConfig(Section, decides="output"):
    """Measurements of each model."""

    temperature: float = Field(0.7, gt=0, description="Sampling temperature of the sampled responses.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the sampled responses, as probability mass.")
    judge_replicates: int = Field(1, ge=1, description="Replicates of the mean of several judgements, on EFT-eval.")
    judge_means: tuple[PositiveInt, ...] = Field(
        (1, 3), description="Numbers of judgements per mean for which the judge is measured."
    )
    base_model: Annotated[bool, Decides("nothing")] = Field(
        False, description="Measure M0 as well, before it is trained: what a chat model can do by itself."
    )
    pairwise: bool = Field(False, description="Compare later models with M1 by a judge, in both orders.")
    pairwise_judge: PairwiseJudgeConfig | None = Field(None, description="Judge of those comparisons; null: M1.")
