"""Training sequences cut from a stream of tokens.

A stream is the documents of a corpus one after the other, each ``<s> text </s>``. A sequence is ``<s>`` and the
tokens of a random window. A share of the sequences carries a span twice: copying is what reading a memory needs most,
and a small model learns it far sooner from text that repeats (see the card of the shipped checkpoint).
"""

import numpy as np

TokenArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def sample_sequences(
    stream: np.ndarray,
    *,
    num_sequences: int,
    sequence_length: int,
    bos_id: int,
    repeat_share: float,
    generator: np.random.Generator,
) -> tuple[TokenArray, TokenArray]:
    """Draws random windows, each beginning with ``<s>``.

    In a ``repeat_share`` of them a span of 32 to a third of the window is written again further on.

    Returns:
        The token ids (num_sequences, sequence_length), and where each window begins in the stream (num_sequences,).
    """
    starts = generator.integers(0, len(stream) - sequence_length, size=num_sequences)
    windows = np.stack([stream[start : start + sequence_length] for start in starts]).astype(np.int64)
    windows[:, 0] = bos_id
    for row in np.flatnonzero(generator.random(num_sequences) < repeat_share):
        span = int(generator.integers(32, sequence_length // 3))
        source = int(generator.integers(1, sequence_length - 2 * span))
        target = int(generator.integers(source + span, sequence_length - span))
        windows[row, target : target + span] = windows[row, source : source + span]
    return windows, starts
