"""Every knob of a run: one pydantic model per YAML section. rules.py has the rules across sections.

Names are Megatron's and TRL's where they have one. Values are plain: no interpolation, no inheritance. Paths are
relative to the folder `srlm` is started in.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from srlm_mega.config import rules
from srlm_mega.config.comparison import EarlyStoppingConfig, PairwiseJudgeConfig
from srlm_mega.config.data import (
    CandidatesConfig,
    EftConfig,
    EvaluationConfig,
    JudgeConfig,
    PromptsConfig,
    SeedDataConfig,
)
from srlm_mega.config.launch import LaunchConfig
from srlm_mega.config.rounds import HealthConfig, MetaJudgeConfig, PairsConfig, RoundConfig
from srlm_mega.config.runtime import RuntimeConfig, SamplerConfig
from srlm_mega.config.section import Decides, Section
from srlm_mega.config.training import (
    DpoConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    Precision,
    TrackingConfig,
    TrainerConfig,
)


class RunConfig(Section, decides="output"):
    """The run's folder, seed and number of rounds."""

    dir: Annotated[Path, Decides("nothing")] = Field(description="Folder of the run; created if missing.")
    seed: int = Field(0, ge=0, description="Seed of the run; every other seed is derived from it.")
    rounds: Annotated[int, Decides("nothing")] = Field(2, ge=0, description="Self-rewarding rounds; 2 make M2 and M3.")

    @field_validator("dir")
    @classmethod
    def _is_no_option(cls, folder: Path) -> Path:
        """A name that commands do not take for one of their options."""
        if str(folder).startswith("-"):
            raise ValueError(f"a command would take {folder} for an option: give an absolute path, or another name")
        return folder


class Config(Section, decides="output"):
    """The whole configuration of one run."""

    run: RunConfig
    model: ModelConfig
    seed_data: SeedDataConfig
    pretrain: OptimizationConfig | None = Field(None, description="Pre-training of M0 (toy world); null: none.")
    sft: OptimizationConfig
    dpo: DpoConfig
    parallel: ParallelConfig = ParallelConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()
    eft: EftConfig = EftConfig()
    prompts: PromptsConfig = PromptsConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    judge: JudgeConfig = JudgeConfig()
    round: RoundConfig = RoundConfig()
    pairs: PairsConfig = PairsConfig()
    meta_judge: MetaJudgeConfig = MetaJudgeConfig()
    health: HealthConfig = HealthConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig | None = Field(None, description="Early stopping; null: all steps are taken.")
    sampler: SamplerConfig = SamplerConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        problems = rules.problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Return the largest number of prompt tokens that leaves room for a whole answer."""
        return self.model.seq_length - max_new_tokens

    @property
    def builds_eft(self) -> bool:
        """True where EFT is built from ranked replies."""
        given = self.seed_data.source == "toy_world" or self.seed_data.eft_path is not None
        wanted = self.eft.mode == "ranks" or not given if self.eft.build is None else self.eft.build
        return self.eft.enabled and wanted

    @property
    def pairwise_judges(self) -> dict[str, PairwiseJudgeConfig]:
        """The external judges of this run, by section."""
        judges = {
            "evaluation.pairwise_judge": self.evaluation.pairwise_judge if self.evaluation.pairwise else None,
            "early_stopping.judge": None if self.early_stopping is None else self.early_stopping.judge,
        }
        return {section: judge for section, judge in judges.items() if judge is not None}

    @property
    def world_size(self) -> int:
        """Number of processes (ranks) of a training stage."""
        return self.launch.nodes * self.launch.processes_per_node

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas of the model in a training stage."""
        return self.world_size // self.parallel.model_parallel_size

    @property
    def logprob_precision(self) -> Precision:
        """Coarsest number format in which sampler or trainer compute log-probabilities: a folder has the trainer's, and
        engines compute attention in 16 bits at most."""
        sampler = self.sampler
        if sampler.quantization is not None or sampler.kv_cache_dtype == "fp8" or self.trainer.fp8 is not None:
            return "fp8"
        return "bf16" if self.trainer.bf16 or sampler.backend != "huggingface" else "fp32"

    @property
    def sampler_replicas(self) -> int:
        """Number of replicas that sample: each holds the model once."""
        return self.sampler.num_devices // self.sampler.devices_per_replica

    @property
    def training_threads(self) -> int:
        """Number of CPU threads of each rank."""
        return self.launch.threads(self.launch.processes_per_node)

    @property
    def starts_replicas(self) -> bool:
        """True where models are sampled by processes of their own, else in the process that runs the stage."""
        return self.sampler.elsewhere or self.sampler_replicas > 1

    @property
    def sampling_threads(self) -> int:
        """Number of CPU threads of each replica; as Slurm steps, each has a node's share."""
        return self.launch.threads(self.sampler.devices_per_node if self.sampler.slurm else self.sampler_replicas)
