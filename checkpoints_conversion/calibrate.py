"""FP8 calibration by nvidia-modelopt: the largest |input| of every linear layer over some prompts, as `amax.json`.

One layer of the model is in memory at a time, on a GPU if there is one: its weights are read, ModelOpt measures while
every prompt goes through it, and the weights of the next one take its place. Between two layers the prompts' hidden
states are on the CPU. (It has not run on a GPU yet.)
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import chain, islice
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from srlm_mega.checkpoints_conversion.bar import no_bar
from srlm_mega.checkpoints_conversion.convert import Bar, open_checkpoint
from srlm_mega.checkpoints_conversion.fp8 import GROUPS, Amax
from srlm_mega.checkpoints_conversion.json_files import bounded_lines, parse_object
from srlm_mega.checkpoints_conversion.llama import EMBEDDING
from srlm_mega.checkpoints_conversion.logits import TORCH_DTYPES, default_dtype, fill_parameter, numbers
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Reader

MAX_PROMPTS, MAX_TOKENS = 512, 2048
LINEARS = tuple(chain(*GROUPS.values()))


def calibrate(folder: Path, prompts: Sequence[Sequence[int]], bar: Bar = no_bar) -> Amax:
    """Measure the input ranges of a checkpoint's model on these token ids. ValueError when there are none, for ids that
    are not of its vocabulary, and where inputs are not finite."""
    checkpoint = open_checkpoint(folder)
    _check_prompts(prompts, checkpoint.shape.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _one_layer(checkpoint, device)
    layer, num_layers = model.layers[0], checkpoint.shape.num_layers
    nbytes = sum(parameter.nbytes for parameter in layer.parameters())
    inputs: dict[str, float] = {}
    with Reader(checkpoint) as reader, bar("FP8 ranges", num_layers * nbytes) as report, torch.no_grad():
        states = _embed(reader, checkpoint, prompts)

        def forward(quantized: nn.Module) -> None:
            for state in states:
                state.copy_(quantized(inputs_embeds=state[None].to(device), use_cache=False).last_hidden_state[0])

        for number in range(num_layers):
            name = f"model.layers.{number}"
            for parameter_name, parameter in layer.named_parameters():
                fill_parameter(parameter, reader, checkpoint.sources[f"{name}.{parameter_name}"])
            try:
                # Quantization is off while it measures, so the states are those of the unquantized model.
                mtq.calibrate(model, "max", forward)
            except FloatingPointError as error:
                raise ValueError(f"{folder}: {name}.{error}: the model is broken, take another") from None
            for member in LINEARS:
                quantizer = layer.get_submodule(member).input_quantizer
                inputs[f"{name}.{member}"] = float(quantizer.amax)
                quantizer.reset_amax()
            report(nbytes)
    return Amax(len(prompts), inputs)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise ValueError("a calibration needs prompts, 128 to 512 of them")
    for number, tokens in enumerate(prompts, start=1):
        if not tokens:
            raise ValueError(f"calibration prompt {number} has no tokens: leave it out")
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"calibration prompt {number} has the token id {token}, and the model knows {vocab_size} tokens: "
                    "encode it with the model's own tokenizer"
                )


def _one_layer(checkpoint: Checkpoint, device: str) -> LlamaModel:
    """Return transformers' model, mask and rotary table included, with one layer and nothing before and after it, and
    with ModelOpt's quantizers of the linear layers' inputs."""
    # It is never asked for an embedding, so it needs no table, and then no id may be in it.
    sizes = {"num_hidden_layers": 1, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.device(device), default_dtype(TORCH_DTYPES[checkpoint.dtype]):
        model = LlamaModel(LlamaConfig(**checkpoint.config | sizes)).eval()
    model.norm = nn.Identity()
    for member in LINEARS:
        model.layers[0].get_submodule(member).register_forward_pre_hook(partial(_check_finite, member))
    mtq.quantize(model, deepcopy(mtq.FP8_DEFAULT_CFG) | {"algorithm": None})
    mtq.disable_quantizer(model, "*weight_quantizer")  # they would measure the weights anew for every prompt
    return model


def _check_finite(member: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Name the linear layer, where ModelOpt fails with an assertion about no layer in particular."""
    largest = float(inputs[0].abs().max())
    if not largest < float("inf"):
        raise FloatingPointError(f"{member} has inputs up to {largest}")


def _embed(reader: Reader, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the embeddings of each prompt's first tokens, [tokens, hidden] on the CPU; rows of others are not read."""
    tokens = [torch.tensor(prompt[:MAX_TOKENS]) for prompt in prompts]
    used, places = torch.cat(tokens).unique(return_inverse=True)
    source, dtype = checkpoint.sources[EMBEDDING], TORCH_DTYPES[checkpoint.dtype]
    rows = [numbers(reader.rows(EMBEDDING, token, 1), source).to(dtype, copy=True) for token in used.tolist()]
    return list(torch.cat(rows)[places].split([len(ids) for ids in tokens]))


def read_prompts(path: Path, folder: Path) -> list[list[int]]:
    """Read the token ids of the first 512 lines of a JSONL file: `tokens`, or text under `text` or `prompt`, encoded by
    the tokenizer of `folder`. ValueError names a line that has none of them."""
    tokenizer = None
    prompts = []
    with path.open("rb") as file:
        for number, line in enumerate(islice(bounded_lines(file, path), MAX_PROMPTS), start=1):
            record = parse_object(line, f"{path}:{number}")
            tokens, text = record.get("tokens"), record.get("text", record.get("prompt"))
            if isinstance(tokens, list) and tokens and all(type(one) is int for one in tokens):
                prompts.append(tokens)
                continue
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: neither `tokens` nor `text` nor `prompt`: give one of them")
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
            prompts.append(list(tokenizer(text)["input_ids"]))
    return prompts
