"""The keys of stochastic rounding's random bits; see `rv_distributed.kernels.noise`."""

from __future__ import annotations

from typing import Final

from blake3 import blake3

#: Words that have the same two keys, and differ in the lower half of their index.
COUNTERS: Final = 1 << 32


def noise_keys(seed: int, name: str, high: int) -> tuple[int, int]:
    """The two keys, of 32 bits, of a tensor's words whose index divided by `COUNTERS` is ``high``."""
    message = seed.to_bytes(8, "little") + high.to_bytes(8, "little") + name.encode("utf-8", "surrogatepass")
    digest = blake3(message).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
