"""The judge that compares two responses, and early stopping by such comparisons."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from srlm_mega.config.section import Decides, Section
from srlm_mega.errors import UserError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class PairwiseJudgeConfig(Section, decides="output"):
    """A model that compares two responses: local, through the sampler, or behind an OpenAI-compatible endpoint."""

    model: str = Field(description="Hugging Face folder of the judge; with `endpoint`, the model's name there.")
    endpoint: Annotated[str | None, Decides("reach")] = Field(
        None, description="Base URL of the endpoint, for example http://host:8000/v1; null: a local judge."
    )
    api_key_variable: Annotated[str | None, Decides("reach")] = Field(
        None, description="Name of the environment variable that holds the endpoint's key; null: no key is sent."
    )
    max_new_tokens: int = Field(512, ge=1, description="Longest judgement, in tokens.")
    timeout_seconds: Annotated[float, Decides("reach")] = Field(
        120.0, gt=0, description="Longest wait for one whole answer of the endpoint, in seconds."
    )
    attempts: Annotated[int, Decides("reach")] = Field(
        5, ge=1, description="Tries of each request to the endpoint, with growing waits between them."
    )
    concurrent_requests: Annotated[int, Decides("reach")] = Field(8, ge=1, description="Requests in flight at once.")
    max_failed_share: Annotated[float, Decides("reach")] = Field(
        0.05, ge=0, lt=1, description="Largest share of comparisons that may fail for good; more stop the run."
    )

    # The messages name no value: who mistakes the fields may have put a key there.
    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            try:
                parts = urlsplit(endpoint)
                is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # a port that is none: it may be the password
                is_url = False
            if not is_url:
                raise ValueError("give the base URL of an OpenAI-compatible endpoint, such as http://host:8000/v1")
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    "the URL carries credentials: remove them, and give the key by an environment variable "
                    "(api_key_variable)"
                )
        return endpoint

    @field_validator("api_key_variable")
    @classmethod
    def _name_of_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not VARIABLE.fullmatch(name):
            raise ValueError("give the NAME of an environment variable, not the key itself")
        return name

    def key(self, environment: Mapping[str, str]) -> str | None:
        """Return the endpoint's key, None where none is sent. UserError when its variable is not set, or
        holds what no request can carry."""
        if self.endpoint is None or self.api_key_variable is None:
            return None
        key = environment.get(self.api_key_variable, "").strip()
        if not key:
            raise UserError(
                f"the judge's `api_key_variable` names {self.api_key_variable}, which is not set in the environment: "
                "export it and start the same command"
            )
        if not (key.isascii() and key.isprintable()):  # which would be quoted by the error that it ends in
            raise UserError(
                f"{self.api_key_variable} in the environment holds a line break or a letter beyond ASCII, which no key "
                "has: export the key alone and start the same command"
            )
        return key


class EarlyStoppingConfig(Section, decides="output"):
    """Comparisons of the newest checkpoint's greedy responses with those of the best one so far, during training."""

    judge: PairwiseJudgeConfig
    stages: tuple[Literal["sft", "dpo"], ...] = Field(
        ("dpo",), description="Trainings that stop early: sft (of M1), dpo (of each round)."
    )
    eval_interval: int = Field(200, ge=1, description="Optimizer steps between comparisons; the last step has one too.")
    stop_below: float = Field(
        0.5, gt=0, lt=1, description="Win rate (ties count half) below which a checkpoint is not kept."
    )
    patience: int = Field(
        1, ge=1, description="Comparisons in a row that may be lost; training stops at the last of them."
    )
    min_valid_share: Annotated[float, Decides("limit")] = Field(
        0.5, gt=0, le=1, description="Smallest share of prompts with a verdict in both orders; fewer stop the run."
    )
