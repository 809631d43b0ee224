"""Random bits that depend on a seed, a tensor's name and an element's index, and on nothing else.

A counter-based generator: a keyed hash of the index, with no state, so that any worker can make the bits of any
elements (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The hash is triple32
(https://github.com/skeeto/hash-prospector), a permutation of the 32-bit numbers by shifts, xors and products; its
avalanche over all 2³² inputs is as good as a random permutation's. One key is added to the index; with it alone, all
tensors would draw on one sequence at different places, so another one is xored in after the first product (added
there, it would shift the first one's place and do no more).

Philox, the generator of that paper, needs the upper halves of products, for which torch has to go through int64: it
would take several times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rv_distributed.kernels.keys import COUNTERS, noise_keys


class Noise:
    """Random bits for one thread on one device, at most ``words`` 32-bit words at a time."""

    def __init__(self, seed: int, *, words: int, device: torch.device) -> None:
        self._seed = seed
        self._counters = torch.arange(words, dtype=torch.int32, device=device)
        self._words = torch.empty_like(self._counters)
        self._scratch = torch.empty_like(self._counters)
        self._made: tuple[str, int, int] | None = None

    def bits16(self, name: str, first: int, count: int) -> Tensor:
        """16 bits for each element from ``first`` of a tensor, as int16: two elements share a word.

        Valid until the next call, as with `bits32`.
        """
        skip = first % 2
        words = self.bits32(name, first // 2, (skip + count + 1) // 2)
        return words.view(torch.int16)[skip : skip + count]

    def bits32(self, name: str, first: int, count: int) -> Tensor:
        """32 bits for each element from ``first`` of a tensor, as int32."""
        if self._made != (name, first, count):
            self._made = (name, first, count)
            done = 0
            while done < count:
                high, low = divmod(first + done, COUNTERS)
                stop = min(count, done + COUNTERS - low)
                self._fill(done, stop, low, *noise_keys(self._seed, name, high))
                done = stop
        return self._words[:count]

    def _fill(self, start: int, stop: int, low: int, key: int, other_key: int) -> None:
        """Make the words ``start`` to ``stop`` from the counters that begin with ``low``."""
        x, scratch = self._words[start:stop], self._scratch[start:stop]
        # Signed sums and products wrap around as unsigned ones do.
        torch.add(self._counters[: stop - start], _signed(low + key), out=x)
        _xor_shifted(x, 17, scratch).mul_(_signed(0xED5AD4BB)).bitwise_xor_(_signed(other_key))
        _xor_shifted(x, 11, scratch).mul_(_signed(0xAC4C1B51))
        _xor_shifted(x, 15, scratch).mul_(_signed(0x31848BAB))
        _xor_shifted(x, 14, scratch)


def _xor_shifted(x: Tensor, by: int, scratch: Tensor) -> Tensor:
    """``x ^= x >> by`` of unsigned numbers; torch's shift would bring copies of the sign in from the left."""
    torch.bitwise_right_shift(x, by, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << 32 - by) - 1))


def _signed(value: int) -> int:
    """The int32 that has the lowest 32 bits of ``value``."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
