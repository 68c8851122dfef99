"""An estimate of what a run writes, before anything is written."""

from dataclasses import dataclass

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import GIB, optimizer_bytes, weight_bytes

JSON_BYTES_PER_TOKEN = 12  # its text (about 4) and its id in the token list (about 6), with room for the record's keys


@dataclass(frozen=True)
class DiskNeed:
    """The figures that decide it. `sampled_tokens`: of candidates and judgements of all rounds, at their longest."""

    parameters: int
    bf16: bool
    exports: int  # model folders: Hugging Face's of all models made here, and the sampler's
    kept_checkpoints: int
    sampled_tokens: int

    @property
    def export_bytes(self) -> int:
        """Bytes of all model folders."""
        return self.exports * self.parameters * weight_bytes(self.bf16)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one training stage's checkpoints: those that are kept and the one that is being written. Each has
        the weights, two fp32 moments of Adam and, with bf16 weights, an fp32 copy of these."""
        each = weight_bytes(self.bf16) + optimizer_bytes(self.bf16)
        return (self.kept_checkpoints + 1) * self.parameters * each

    @property
    def sample_bytes(self) -> int:
        """Bytes of the JSON lines."""
        return self.sampled_tokens * JSON_BYTES_PER_TOKEN

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.export_bytes + self.checkpoint_bytes + self.sample_bytes

    def __str__(self) -> str:
        weights, optimizer = weight_bytes(self.bf16), optimizer_bytes(self.bf16)
        return (
            f"{self.exports} models * {self.parameters:,} parameters * {weights} bytes = "
            f"{self.export_bytes / GIB:.1f} GiB, {self.kept_checkpoints} + 1 checkpoints * "
            f"{weights + optimizer} bytes = {self.checkpoint_bytes / GIB:.1f} GiB, "
            f"{self.sampled_tokens:,} sampled tokens * {JSON_BYTES_PER_TOKEN} bytes = {self.sample_bytes / GIB:.1f} GiB"
        )


def disk_need(config: Config, exports: int) -> DiskNeed:
    """Estimate what the whole run writes, with `exports` model folders."""
    model, candidates, judge = config.model, config.candidates, config.judge
    per_prompt = candidates.n * (candidates.max_new_tokens + judge.n * judge.max_new_tokens)
    return DiskNeed(
        parameters=model.sizes.parameters,
        bf16=config.trainer.bf16,
        exports=exports,
        kept_checkpoints=config.trainer.keep_checkpoints,
        sampled_tokens=config.run.rounds * config.prompts.per_round * per_prompt,
    )
