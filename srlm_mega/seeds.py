"""Seeds: everything random has a path of names, and derives its seed from that and the run's seed."""

import xxhash


def derive_seed(run_seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2^31) from the run's seed and a path of names, the same on every machine."""
    return xxhash.xxh3_64_intdigest("/".join(str(part) for part in (run_seed, *names)).encode()) & 0x7FFFFFFF
