"""Pieces that are no references yet are split or joined: those with too many tokens, none, or only white space.

    pieces (:mod:`pipelines.pieces`) -> **pieces that are references** -> table (:mod:`pipelines.tabulating`)

Pieces are cut by the tokens of their document. Alone a piece can have others, more of them or none at all. Only the
documents with such a piece are looked at, one piece after the other.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.boundaries import find_text_ends, rank_places
from pipelines.cutting import find_cuts
from pipelines.pieces import Pieces
from pipelines.spans import Corpus, get_bytes
from schemas.errors import InputError
from schemas.protocols import IntArray, TextTokenizer


def mend_pieces(pieces: Pieces, corpus: Corpus, tokenizer: TextTokenizer, *, max_tokens: int, boundary: str) -> Pieces:
    """Mends the documents with a piece that has too many tokens, none, or only white space.

    Args:
        pieces: the pieces of the corpus.
        corpus: the documents.
        tokenizer: the language model's tokenizer.
        max_tokens: the greatest number of tokens in a piece.
        boundary: what counts as a boundary where a piece is split, one of :data:`pipelines.boundaries.BOUNDARIES`.

    Returns:
        Pieces of 1 to ``max_tokens`` tokens that cover the documents; a document without any token has none. Documents
        with nothing to mend keep theirs.

    Raises:
        InputError: ``max_tokens`` cannot hold a single character, or the tokenizer gives no token to a part that had
            many within its document.
    """
    is_blank = find_text_ends(corpus.data, pieces.starts, pieces.ends) == pieces.starts
    is_bad = is_blank | (pieces.counts == 0) | (pieces.counts > max_tokens)
    bad_rows = np.unique(pieces.rows[is_bad])
    if not len(bad_rows):
        return pieces
    is_kept = ~np.isin(pieces.rows, bad_rows)
    mended: list[tuple[int, int, int, bool, int, int]] = []
    token_ids, num_tokens = [pieces.token_ids], len(pieces.token_ids)
    for row in bad_rows.tolist():
        base = int(corpus.offsets[row])
        mender = _Mender(
            content=corpus.data[base : corpus.offsets[row + 1]].tobytes(),
            head=corpus.heads[corpus.head_offsets[row] : corpus.head_offsets[row + 1]].tobytes().decode(),
            num_head_tokens=int(corpus.num_head_tokens[row]),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            boundary=boundary,
        )
        low, high = np.searchsorted(pieces.rows, [row, row + 1])
        own = [
            _Piece(start - base, end - base, prefixed, pieces.token_ids[first : first + count])
            for start, end, prefixed, first, count in zip(
                *(column[low:high].tolist() for column in (pieces.starts, pieces.ends, pieces.prefixed)),
                *(column[low:high].tolist() for column in (pieces.lows, pieces.counts)),
                strict=True,
            )
        ]
        for piece in mender.mend(own):
            count = len(piece.token_ids)
            mended.append((row, base + piece.start, base + piece.end, piece.prefixed, num_tokens, count))
            token_ids.append(piece.token_ids)
            num_tokens += count
    added = np.array(mended, dtype=np.int64).reshape(-1, 6).T
    columns = (pieces.rows, pieces.starts, pieces.ends, pieces.prefixed, pieces.lows, pieces.counts)
    joined = [np.concatenate([column[is_kept], new]) for column, new in zip(columns, added, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    rows, starts, ends, prefixed, lows, counts = (column[order] for column in joined)
    return Pieces(
        rows=rows,
        starts=starts,
        ends=ends,
        prefixed=prefixed.astype(bool),
        lows=lows,
        counts=counts,
        token_ids=np.concatenate(token_ids),
    )


class _Piece(NamedTuple):
    """A piece of one document, in bytes of it, with its tokens."""

    start: int
    end: int
    prefixed: bool
    token_ids: IntArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mender:
    """Mends the pieces of one document.

    Attributes:
        content: the bytes of the document.
        head: the title and line end to put before pieces, or nothing.
        num_head_tokens: how many tokens the head has.
        tokenizer: the language model's tokenizer.
        max_tokens: the greatest number of tokens in a piece.
        boundary: what counts as a boundary.
    """

    content: bytes
    head: str
    num_head_tokens: int
    tokenizer: TextTokenizer
    max_tokens: int
    boundary: str

    def mend(self, pieces: Sequence[_Piece]) -> list[_Piece]:
        """Splits pieces with too many tokens, and joins those without tokens or of white space to a neighbour.

        White space stays a reference of its own only if neither neighbour has room for it.
        """
        mended: list[_Piece] = []
        for piece in self.split_all(pieces):
            if mended and (self.is_weak(mended[-1]) or self.is_weak(piece)):
                joined = self.encode(mended[-1].start, piece.end)
                if len(joined.token_ids) <= self.max_tokens:
                    mended[-1] = joined
                    continue
            mended.append(piece)
        without_tokens = [piece for piece in mended if not self.has_tokens(piece)]
        if len(without_tokens) == len(mended):
            return []
        if without_tokens:
            part = self.get_text(without_tokens[0].start, without_tokens[0].end)
            raise InputError(
                f"chunking: the tokenizer gives no token to {part!r:.80} alone, must give one; use another"
            )
        return mended

    def split_all(self, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
        """Yields the pieces, those with too many tokens in parts, so that both starts and ends ascend.

        What has to be split, or begins before the last part of what was, loses its overlap.
        """
        last = _Piece(-1, 0, False, np.empty(0, dtype=np.int32))
        for piece in pieces:
            is_bad = piece.start <= last.start or len(piece.token_ids) > self.max_tokens
            for part in self.split(self.encode(last.end, piece.end) if is_bad and piece.start < last.end else piece):
                yield part
                last = part

    def get_text(self, start: int, end: int) -> str:
        return self.content[start:end].decode()

    def is_weak(self, piece: _Piece) -> bool:
        return not self.has_tokens(piece) or self.get_text(piece.start, piece.end).isspace()

    def has_tokens(self, piece: _Piece) -> bool:
        """Tells whether the text of a piece has a token without the title."""
        if not piece.prefixed or len(piece.token_ids) > self.num_head_tokens:
            return len(piece.token_ids) > 0
        return len(self.tokenizer.encode([self.get_text(piece.start, piece.end)])[0]) > 0

    def encode(self, start: int, end: int) -> _Piece:
        text = self.get_text(start, end)
        prefixed = not text.startswith(self.head[:-1])
        tokens = self.tokenizer.encode([self.head + text if prefixed else text])[0]
        if len(tokens) > self.max_tokens and prefixed and len(text) == 1:  # better without than not at all
            prefixed, tokens = False, self.tokenizer.encode([text])[0]
        return _Piece(start, end, prefixed, tokens)

    def split(self, piece: _Piece) -> list[_Piece]:
        """Splits a piece until no part has too many tokens.

        Alone a piece can have more tokens than within the document, for instance where a tokenizer puts a space before
        every text. It is split at the best boundary of its middle half, so that no part becomes a mere rest.
        """
        if len(piece.token_ids) <= self.max_tokens:
            return [piece]
        text = self.get_text(piece.start, piece.end)
        if len(text) == 1:
            if piece.prefixed:
                return self.split(self.encode(piece.start, piece.end))
            raise InputError(
                f"chunking: max_tokens is {self.max_tokens}, but the character {text!r} alone takes "
                f"{len(piece.token_ids)} tokens, must be at least that"
            )
        middle = piece.start + self.find_middle(text)
        halves = (self.encode(piece.start, middle), self.encode(middle, piece.end))
        return [part for half in halves for part in self.split(half)]

    def find_middle(self, text: str) -> int:
        """Returns the byte of a text of several characters at which to split it."""
        array = pa.array([text], pa.string())
        data, offsets = get_bytes(array)
        tokens = self.tokenizer.encode_texts(array)
        ranks = rank_places(data, offsets, self.boundary)
        places, counts = find_cuts(data, ranks, tokens.starts, tokens.ends)
        last = len(places) - 1
        if last < 2:
            return len(text[: len(text) // 2].encode())
        quarters = np.array([1, 3]) * counts[last] / 4
        low = min(max(int(np.searchsorted(counts, quarters[0])), 1), last - 1)
        high = min(max(int(np.searchsorted(counts, quarters[1], side="right")) - 1, low), last - 1)
        best = max(range(low, high + 1), key=lambda index: (-int(ranks[places[index]]), index))
        return int(places[best])
