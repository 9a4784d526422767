"""The order in which sequences are drawn: shuffled, endless, and a function of the position alone.

Sequences lie in blocks, which are read as a whole. For each epoch the blocks are shuffled; some of them at a time are a
window, and the sequences of a window are shuffled again. So the order is close to a shuffle of everything while no more
than a window is held, and what stands at a position is found without drawing what comes before.
"""

import functools
from collections.abc import Sequence

import numpy as np

from schemas.errors import InputError
from schemas.protocols import LongArray

_BLOCKS, _WINDOW = 1, 2
"""What a random number is for, so that no two uses share one."""


class SequenceOrder:
    """An endless order of sequences in blocks.

    Attributes:
        num_sequences: sequences of all blocks, which is the length of an epoch.
    """

    def __init__(self, block_sizes: Sequence[int], *, seed: int, blocks_per_window: int) -> None:
        """Chooses an order.

        Args:
            block_sizes: sequences in each block.
            seed: seed of the order.
            blocks_per_window: blocks whose sequences are shuffled together.

        Raises:
            InputError: there is no sequence, or a window of no block.
        """
        if blocks_per_window < 1:
            raise InputError(f"order: blocks_per_window is {blocks_per_window}, must be at least 1")
        self._sizes = np.asarray(block_sizes, dtype=np.int64)
        self.num_sequences = int(self._sizes.sum())
        if not self.num_sequences:
            raise InputError("order: there are no sequences to draw; prepare a corpus that has some text")
        self._seed, self._blocks_per_window = seed, blocks_per_window
        # A step may reach from one window, or epoch, into the next; older ones do not come back.
        self._find_windows = functools.lru_cache(maxsize=2)(self._shuffle_blocks)
        self._find_places = functools.lru_cache(maxsize=2)(self._shuffle_window)

    def locate(self, position: int) -> tuple[int, int]:
        """Returns the block of the sequence at a position, and its row in the block."""
        epoch, place = divmod(position, self.num_sequences)
        _, ends = self._find_windows(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[window - 1]) if window else 0
        block, row = self._find_places(epoch, window)[place - start]
        return int(block), int(row)

    def _shuffle_blocks(self, epoch: int) -> tuple[list[LongArray], LongArray]:
        """Returns the blocks of each window of an epoch, and the place after the last sequence of each."""
        blocks = np.random.default_rng((self._seed, _BLOCKS, epoch)).permutation(len(self._sizes))
        starts = range(0, len(blocks), self._blocks_per_window)
        windows = [blocks[start : start + self._blocks_per_window] for start in starts]
        return windows, np.cumsum([self._sizes[window].sum() for window in windows])

    def _shuffle_window(self, epoch: int, window: int) -> LongArray:
        """Returns block and row of each sequence of a window, (sequences, 2)."""
        blocks = self._find_windows(epoch)[0][window]
        places = np.concatenate(
            [
                np.stack((np.full(size, block), np.arange(size)), 1)
                for block, size in zip(blocks, self._sizes[blocks], strict=True)
            ]
        )
        shuffled: LongArray = np.random.default_rng((self._seed, _WINDOW, epoch, window)).permutation(places)
        return shuffled
