"""Secrets that a configuration would carry into provenance.json, the report and a job's script: found and refused."""

import re
from urllib.parse import urlsplit

EXPORT = (
    "put it as NAME=value into a file of mode 0600 outside of the run, named by launch.slurm.secrets_file; without "
    "Slurm export it in the shell that starts srlm"
)
# Whole words of a name: MAX_NUM_BATCHED_TOKENS, NCCL_IB_PKEY, wckey and TOKENIZERS_PARALLELISM are no secrets.
SECRET = re.compile(
    r"(KEYS?|APIKEYS?|TOKEN|PASS|PWD|PAT|CREDENTIALS?|.*(SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE))\d*", re.IGNORECASE
)
WORD_ENDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])")
SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):/(?!/)", re.IGNORECASE)
ASSIGNED = re.compile(r"([A-Za-z_]\w*)=[^,\s]")


def check_option(option: str) -> None:
    """Raise ValueError, without the value, for an option of sbatch that sets something to what seems a secret."""
    for name in ASSIGNED.findall(option):
        check_variable(name, option.partition("=")[2])


def names_secret(text: str) -> bool:
    """Tell whether a name, or one in a text, is of a secret: by its words, between which is `_` or a capital letter."""
    return any(map(SECRET.fullmatch, WORD_ENDS.split(text)))


def check_variable(name: str, value: str) -> None:
    """Raise ValueError, without the value, for a variable that seems to hold a secret, by its name or as a URI."""
    if names_secret(name):
        raise ValueError(f"{name} seems to be a secret, and the run keeps its configuration: {EXPORT}")
    if has_credentials(value):
        raise ValueError(f"{name} is a URI with credentials, and the run keeps its configuration: {EXPORT}")


def has_credentials(uri: str) -> bool:
    """Tell whether a text is a URI with a password, or with a secret among its parameters or as its user. A path that
    was meant to be one has lost a slash."""
    try:
        parts = urlsplit(SCHEME.sub(r"\1://", uri))
    except ValueError:  # no URI
        return False
    is_token = parts.scheme in ("http", "https") and parts.username
    return bool(parts.scheme and (parts.password or is_token or names_secret(parts.query)))
