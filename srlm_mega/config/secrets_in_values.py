"""Secrets that a configuration would carry into provenance.json, the report and a job's script: found and refused."""

import re
from urllib.parse import urlsplit

EXPORT = (
    "put it as NAME=value into a file of mode 0600 outside of the run, named by launch.slurm.secrets_file; without "
    "Slurm export it in the shell that starts srlm"
)
NAMES = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # TOKENIZERS_PARALLELISM is none


SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):/(?!/)", re.IGNORECASE)
ASSIGNED = re.compile(r"([A-Za-z_]\w*)=[^,\s]")


def check_option(option: str) -> None:
    """Raise ValueError, without the value, for an option of sbatch that sets something to what seems a secret."""
    for name in ASSIGNED.findall(option):
        check_variable(name, option.partition("=")[2])


def check_variable(name: str, value: str) -> None:
    """Raise ValueError, without the value, for a variable that seems to hold a secret, by its name or as a URI."""
    if NAMES.search(name):
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
    return bool(parts.scheme and (parts.password or is_token or NAMES.search(parts.query)))
