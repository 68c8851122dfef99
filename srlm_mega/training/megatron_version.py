"""The versions of megatron-core that training takes, and what differs between them.

Training builds on parts of megatron-core that change without notice, and on a CPU replaces some by name: every call was
compared with the source of these versions, and any other is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from srlm_mega.errors import UserError


@dataclass(frozen=True)
class MegatronVersion:
    """What is particular to a version.

    own_writer: more arguments of dist_checkpointing.save, so that Megatron's own processes write the files.
    common_file: its checkpoints have a file `common.pt`, and it reads none without.
    waits_for_stream: the reduction of gradients asks for CUDA's current stream, on a CPU too.
    """

    own_writer: Mapping[str, str]
    common_file: bool
    waits_for_stream: bool


VERSIONS = {
    "0.16.1": MegatronVersion(own_writer={}, common_file=True, waits_for_stream=False),
    "0.19.2": MegatronVersion(own_writer={"async_strategy": "mcore"}, common_file=False, waits_for_stream=True),
}


def megatron_version(found: str) -> MegatronVersion:
    """Return what is particular to the version `found`. UserError for one that training was not compared with."""
    if found not in VERSIONS:
        raise UserError(
            f"training takes megatron-core {' or '.join(VERSIONS)}, found {found}: "
            f"pip install --no-deps megatron-core=={next(iter(VERSIONS))}"
        )
    return VERSIONS[found]
