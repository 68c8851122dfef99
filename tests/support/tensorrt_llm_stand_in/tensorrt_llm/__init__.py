"""A STAND-IN, not TensorRT-LLM: the part of its public 1.2 LLM API that the samplers use, as documented, and strict.

TensorRT-LLM cannot be imported on a machine without a GPU. What is here has the names, arguments, defaults and rules
of the documented interface: an unknown argument, a wrong type or an impossible request is an error, where a loose mock
would nod. It says nothing about whether the real one works; tests/gpu asks that.

Behind the interface sits a toy in place of a model: each next token is a pure function of the prompt, the tokens so
far and the seed, or (greedy) of the first two.
"""

from tensorrt_llm.llmapi import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]
__version__ = "1.2.1+stand.in"
