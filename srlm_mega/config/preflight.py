"""What `srlm launch preflight` takes for wrong, and how long it waits."""

from pydantic import Field

from srlm_mega.config.section import Section


class PreflightConfig(Section, decides="layout"):
    """The look at all nodes before a job; both waits together should stay under a minute."""

    check_seconds: float = Field(10.0, gt=0, description="Longest time of one check on one node.")
    report_seconds: float = Field(15.0, gt=0, description="How long node 0 waits for the reports of all nodes.")
    allreduce_seconds: float = Field(
        35.0, gt=0, description="Longest time of the all-reduces, start of ranks included."
    )
    allreduce_mib: int = Field(16, ge=1, description="What each rank of a group adds up, in MiB.")
    floor_within_node: float = Field(
        0.01, ge=0, description="GB/s (bus bandwidth, as nccl-tests counts it) of groups whose ranks share a node."
    )
    floor_between_nodes: float = Field(
        0.01,
        ge=0,
        description="The same of groups that span nodes. Set both to half of what the cluster gave when well.",
    )
    max_clock_skew_seconds: float = Field(5.0, gt=0, description="How far a node's clock may be from the others'.")
