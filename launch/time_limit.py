"""A job's time limit: read as Slurm reads it, and refused where no attempt could come further before its warning."""

import re

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import weight_bytes
from srlm_mega.errors import UserError

DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")  # days-hours[:minutes[:seconds]]
MINUTES = re.compile(r"(?:(\d+):(?=\d+:))?(\d+)(?::(\d+))?")  # minutes, minutes:seconds, hours:minutes:seconds
UNLIMITED = ("unlimited", "infinite", "-1", "0")
EARLY_SECONDS = 60  # Slurm may warn so much earlier than it is told (sbatch, --signal)
PREFLIGHT_EXTRA_SECONDS = 8.0  # a preflight's waits that are no settings
START_SECONDS = 60.0  # Python, torch and Megatron on all nodes, and a first step
READ_BYTES_PER_SECOND = 1e9  # of weights, by each node: a slow shared disk


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time limit in one of Slurm's forms, which it rounds up to minutes; None for no limit
    (UNLIMITED), and for what is none of these forms."""
    if (match := DAYS.fullmatch(limit)) is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif (match := MINUTES.fullmatch(limit)) is not None:
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in match.groups())
    else:
        return None
    return ((days * 24 + hours) * 60 + minutes + -(-seconds // 60)) * 60 or None


def check_time_limit(limit: str, source: str, config: Config, has_preflight: bool) -> None:
    """UserError, with the arithmetic, when an attempt of a job could only start before it is warned and queues itself
    again. `source` says where the limit is from."""
    seconds = seconds_of(limit)
    preflight = config.launch.preflight
    checked = preflight.report_seconds + preflight.allreduce_seconds + PREFLIGHT_EXTRA_SECONDS if has_preflight else 0.0
    weights = weight_bytes(config.trainer.bf16) * config.model.sizes.parameters
    start = START_SECONDS + weights / READ_BYTES_PER_SECOND
    needed = round(checked) + round(start) + config.launch.slurm.signal_seconds + EARLY_SECONDS
    if seconds is not None and seconds < needed:
        raise UserError(
            f"{source}={limit} is {seconds} s, and an attempt that comes further needs {needed} s: {checked:.0f} s for "
            f"the preflight + {start:.0f} s to start, load and take a step + {config.launch.slurm.signal_seconds} s of "
            f"warning, for a step and a checkpoint (launch.slurm.signal_seconds) + {EARLY_SECONDS} s by which Slurm "
            "may warn earlier. Give more time (--time), or a shorter warning that still holds a checkpoint"
        )
