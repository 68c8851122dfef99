"""A STAND-IN, not TensorRT-LLM: the part of its public LLM API that the samplers use, as documented, and strict.

TensorRT-LLM cannot be imported on a machine without a GPU. What is here has the names, arguments, defaults and rules
of the documented interface: an unknown argument, a wrong type or an impossible request is an error, where a loose mock
would nod. It says nothing about whether the real one works; tests/gpu asks that.

Behind the interface sits a toy in place of a model: each next token is a pure function of the prompt, the tokens so
far and the seed, or (greedy) of the first two. A thread plays the executor's processes: requests are answered in no
particular order.

It plays two versions, chosen by the environment variable STAND_IN_VERSION when it is imported (form.py):
- 1.2 (default): `sampler_type`, without which a request's seed is not looked at; the engine backend; after the executor
  died, what was asked is never answered and what is asked is refused.
- 1.4: no `sampler_type`, no engine backend; seeds are looked at; log-probabilities are untempered; after the executor
  died, what was asked is answered by EngineDeadError too.

It fails on demand (failures.py), by environment variables that are read when an `LLM` is made, or by the attribute
`LLM.failures`, which wins:
- STAND_IN_REFUSED_TOKEN=ID: a request whose prompt holds this token is answered by a RequestError.
- STAND_IN_CANCELLED_TOKEN=ID: a request whose prompt holds this token ends as `cancelled`.
- STAND_IN_DIES_AFTER=N: after N answers the executor dies, and everything raises RuntimeError for ever.
- STAND_IN_HANGS_AFTER=N: after N answers there are no more, and nothing says so.
- STAND_IN_SLOW_START=SECONDS: loading takes as long.
- STAND_IN_FAILS_ONCE=FILE: only the process that makes this file dies or hangs; the next ones live.
"""

from pathlib import Path

from tensorrt_llm.form import OLD
from tensorrt_llm.llmapi import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]
__version__ = "1.2.1+stand.in" if OLD else "1.4.0rc4+stand.in"
if OLD:
    __path__.append(str(Path(__file__).parents[1] / "only_1_2"))
