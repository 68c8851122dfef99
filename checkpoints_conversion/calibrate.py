"""FP8 calibration by nvidia-modelopt: the largest |input| of every linear layer over some prompts, as `amax.json`.

The whole model is held in memory, on a GPU if there is one. (It has not run on a GPU yet.)
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path

import modelopt.torch.quantization as mtq
import orjson
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.fp8 import Amax, linear_names
from srlm_mega.checkpoints_conversion.huggingface import read_shape

MAX_PROMPTS, MAX_TOKENS = 512, 2048


def calibrate(folder: Path, prompts: Sequence[list[int]]) -> Amax:
    """Measure the input ranges of a Hugging Face folder's model on these token ids. ValueError when there are none."""
    if not prompts:
        raise ValueError("a calibration needs prompts, 128 to 512 of them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()

    def forward(quantized: nn.Module) -> None:
        with torch.no_grad():
            for tokens in prompts:
                quantized(torch.tensor([tokens[:MAX_TOKENS]], device=device))

    mtq.quantize(model, deepcopy(mtq.FP8_DEFAULT_CFG), forward)
    inputs = {name: float(model.get_submodule(name).input_quantizer.amax) for name in linear_names(read_shape(folder))}
    return Amax(len(prompts), inputs)


def read_prompts(path: Path, folder: Path) -> list[list[int]]:
    """Read the token ids of the first 512 lines of a JSONL file: `tokens`, or text under `text` or `prompt`, encoded by
    the tokenizer of `folder`. ValueError names a line that has none of them."""
    tokenizer = None
    prompts = []
    with path.open("rb") as file:
        for number, line in enumerate(islice(file, MAX_PROMPTS), start=1):
            record = orjson.loads(line)
            if "tokens" in record:
                prompts.append(list(record["tokens"]))
                continue
            text = record.get("text", record.get("prompt"))
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: neither `tokens` nor `text` nor `prompt`: give one of them")
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
            prompts.append(list(tokenizer(text)["input_ids"]))
    return prompts
