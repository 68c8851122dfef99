"""Whether a Hugging Face folder from outside can be trained and sampled, without torch: asked before a job is queued
and when a run takes the folder."""

import re
from pathlib import Path

from tokenizers import Tokenizer

from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, read_config, stored_tensors
from srlm_mega.checkpoints_conversion.model_place import unread
from srlm_mega.checkpoints_conversion.verify import check_verified

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 * 1024**2  # the largest have 35 MB
# One that the pieces do not have ends this process within the tokenizers library.
SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


def check_model_folder(folder: Path, allow_unverified: bool) -> None:
    """ValueError, which names the file and what to do, unless a folder has every tensor of its config, one set of
    weights, a tokenizer whose ids all have an embedding and, if it was converted, its proof (or `allow_unverified`).
    Of weights above 256 MiB only headers and sizes are read, and bytes only of tensors that are there twice."""
    _, shape = read_config(folder)
    if not allow_unverified:
        check_verified(folder, quick=True)
    stored_tensors(folder, shape)
    check_tokenizer(folder, shape.vocab_size)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """ValueError unless a folder has a `tokenizer.json` that can be read and whose ids are all below `vocab_size`."""
    file = folder / TOKENIZER
    tokenizer = read_tokenizer(file)
    highest = highest_token_id(tokenizer)
    if highest >= vocab_size:
        raise ValueError(
            f"{file} has {tokenizer.id_to_token(highest)!r} with id {highest}, and the model's embedding ends at id "
            f"{vocab_size - 1} (vocab_size {vocab_size} in {CONFIG}): take the tokenizer that the model came with, or "
            "resize_token_embeddings to all ids, train them, and save the model again"
        )


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a `tokenizer.json`. ValueError when it is not there, with the line that makes it, or cannot be read."""
    folder = file.parent
    if (reason := unread(file)) is not None:
        raise ValueError(reason)
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
        found = f" ({others[0]} alone is not read)" if others else ""
        raise ValueError(f"{folder} has no {file.name}{found}. This line of transformers makes it: {saving(folder)}")
    if file.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB, as none is: download it again")
    content = file.read_bytes()
    if SUBWORD_PREFIX.search(content):
        raise ValueError(f"{file} has a continuing_subword_prefix, and no Llama's has one: download it again")
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the reader raises bare Exception
        raise ValueError(f"{file} cannot be read ({error}): download it again") from None


def saving(folder: Path) -> str:
    """Return the line of transformers that writes a folder's tokenizer.json anew, from all that it reads there."""
    return f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"


def highest_token_id(tokenizer: Tokenizer) -> int:
    """Return the highest id that a tokenizer can produce, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
