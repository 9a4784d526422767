r"""The first step of a byte-level tokenizer: text cut into pretokens, words with the space before them and the like.

    tokenizer.json -> **pattern** -> **pretokens** -> tokens (:mod:`model.byte_pairs`)

Byte-level tokenizers share a few regular expressions, written down in their ``tokenizer.json``. A general engine spends
most of a tokenizer's time on them. Here each is a set of parameters of one loop over bytes, with the classes of
characters (``\p{L}``, ``\p{N}``, ``\s``) asked from the engine of ``tokenizers`` itself, so that both know the same
Unicode. The expressions are those of GPT-2, of cl100k (OpenAI's name; Llama 3 has it too) and of Qwen2.
"""

import dataclasses
import functools
from typing import Any

import numba
import numpy as np
from tokenizers import Regex, pre_tokenizers

from schemas.protocols import LongArray, MaskArray
from schemas.records import Bytes

OTHER, LETTER, NUMBER, SPACE, NEWLINE = range(5)
"""Classes of characters. ``NEWLINE`` is a line feed or carriage return, ``SPACE`` every other white space."""

NUM_CLASSIFIED = 0x40000
"""Code points with an entry in the table of classes; those beyond are of no class (tags, private use)."""

_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_NUMBER = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """A pre-tokenizer of a known family.

    Attributes:
        name: the tokenizer it is known from.
        max_digits: how many numbers a pretoken may hold.
        spaced_numbers: a space joins the numbers after it, as it does letters.
        cl100k: letters take any one character but a number or a line end before them, marks take the line ends
            after them, white space ends with its last line end, and contractions may be capital.
    """

    name: str
    max_digits: int = _ANY_NUMBER
    spaced_numbers: bool = False
    cl100k: bool = False


_PATTERNS = {
    _GPT2: Pattern(name="GPT-2", spaced_numbers=True),
    _CL100K % r"\p{N}{1,3}": Pattern(name="cl100k", max_digits=3, cl100k=True),
    _CL100K % r"\p{N}": Pattern(name="Qwen2", max_digits=1, cl100k=True),
}


def find_pattern(pre_tokenizer: dict[str, Any] | None) -> Pattern | None:
    """Returns the pattern of the part ``pre_tokenizer`` of a ``tokenizer.json``, or None if it is not known here."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _PATTERNS[_GPT2]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return _PATTERNS.get(regex)
    return None


@functools.cache
def get_class_table() -> Bytes:
    """Returns the class of each code point below NUM_CLASSIFIED, as the engine of ``tokenizers`` sees it."""
    points = np.arange(NUM_CLASSIFIED)
    points = points[(points < 0xD800) | (points >= 0xE000)]
    text = points.astype("<u4").tobytes().decode("utf-32-le")
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|\s+"), "isolated")
    starts = np.array([start for _, (start, _) in split.pre_tokenize_str(text)])
    # A piece is of one class, that of its first character; asked apart, each of these is a short text.
    firsts = "".join(text[start] for start in starts)
    classes = np.full(len(starts), OTHER, dtype=np.uint8)
    for regex, code in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)):
        rest = pre_tokenizers.Split(Regex(regex), "removed").pre_tokenize_str(firsts)
        is_rest = np.zeros(len(firsts), dtype=bool)
        for _, (start, end) in rest:
            is_rest[start:end] = True
        classes[~is_rest] = code
    table = np.full(NUM_CLASSIFIED, OTHER, dtype=np.uint8)
    table[points] = np.repeat(classes, np.diff(starts, append=len(text)))
    table[[ord("\n"), ord("\r")]] = NEWLINE
    return table


def find_pretokens(
    data: Bytes, offsets: LongArray, pattern: Pattern, ends: LongArray, separable: MaskArray, counts: LongArray
) -> int:
    """Finds the pretokens of texts.

    A pretoken of a part of a text is one of the text, and the other way round, if the part begins and ends where
    pretokens do and the end is separable. Only white space before something that it cannot join is not: of ``a  1``
    the two spaces are two pretokens, but ``a  `` alone ends in one of two.

    Args:
        data: UTF-8, and at least 4 more bytes.
        offsets: bytes of text i are ``offsets[i]:offsets[i + 1]``, shape (N+1,).
        pattern: the tokenizer's.
        ends: takes the end of each pretoken in ``data``; one begins where the last ended. As long as the texts.
        separable: takes whether a text can be cut before each pretoken. As long as the texts.
        counts: takes the number of pretokens of each text, shape (N,).

    Returns:
        The number of pretokens.
    """
    return int(
        _find_pretokens(
            data,
            offsets,
            get_class_table(),
            pattern.max_digits,
            pattern.spaced_numbers,
            pattern.cl100k,
            ends,
            separable,
            counts,
        )
    )


def find_texts_with_others(data: Bytes, offsets: LongArray, classes: Bytes) -> MaskArray:
    """Marks the texts that have a character of class OTHER by a table like that of :func:`get_class_table`.

    Args:
        data: UTF-8, and at least 4 more bytes.
        offsets: bytes of text i are ``offsets[i]:offsets[i + 1]``, shape (N+1,).
        classes: a class a code point, shape (NUM_CLASSIFIED,).

    Returns:
        A value a text, shape (N,).
    """
    found = np.zeros(len(offsets) - 1, dtype=np.bool_)
    _find_texts_with_others(data, offsets, classes, found)
    return found


@numba.njit(cache=True, nogil=True)
def _read_class(data: Bytes, at: int, classes: Bytes) -> tuple[int | np.int64, int]:
    """Returns the class of the character at a byte, and its size in bytes."""
    first = np.int64(data[at])
    if first < 0x80:
        return np.int64(classes[first]), 1
    second = np.int64(data[at + 1]) & 0x3F
    if first < 0xE0:
        return np.int64(classes[(first & 0x1F) << 6 | second]), 2
    third = np.int64(data[at + 2]) & 0x3F
    if first < 0xF0:
        return np.int64(classes[(first & 0x0F) << 12 | second << 6 | third]), 3
    point = (first & 0x07) << 18 | second << 12 | third << 6 | np.int64(data[at + 3]) & 0x3F
    return (np.int64(classes[point]) if point < NUM_CLASSIFIED else OTHER), 4


@numba.njit(cache=True, nogil=True)
def _find_run_end(data: Bytes, at: int, end: int, classes: Bytes, wanted: int) -> int:
    """Returns where a run of characters of one class ends."""
    while at < end:
        code, size = _read_class(data, at, classes)
        if code != wanted:
            break
        at += size
    return at


@numba.njit(cache=True, nogil=True)
def _find_contraction_end(data: Bytes, at: int, end: int, fold_case: bool) -> int:
    """Returns where ``'s 't 're 've 'm 'll 'd`` ends, whose apostrophe stands before ``at``; 0 if it is none."""
    if at >= end:
        return 0
    # The long s, U+017F, is a capital of s to a case-folding engine.
    if fold_case and data[at] == 0xC5 and at + 1 < end and data[at + 1] == 0xBF:
        return at + 2
    bit = 0x20 if fold_case else 0
    first = data[at] | bit
    if first == ord("s") or first == ord("t") or first == ord("m") or first == ord("d"):
        return at + 1
    if at + 1 < end:
        second = data[at + 1] | bit
        if first == second == ord("l") or (second == ord("e") and (first == ord("r") or first == ord("v"))):
            return at + 2
    return 0


@numba.njit(cache=True, nogil=True)
def _find_pretokens(
    data: Bytes,
    offsets: LongArray,
    classes: Bytes,
    max_digits: int,
    spaced_numbers: bool,
    cl100k: bool,
    ends: LongArray,
    separable: MaskArray,
    counts: LongArray,
) -> int:
    """The loop of :func:`find_pretokens`: alternatives are tried in the order of the regular expression."""
    num_pretokens = 0
    for row in range(len(counts)):
        at = offsets[row]
        end = offsets[row + 1]
        before = num_pretokens
        not_separable = -1
        while at < end:
            separable[num_pretokens] = at != not_separable
            first = data[at]
            code, size = _read_class(data, at, classes)
            after = at + size
            stop = _find_contraction_end(data, after, end, cl100k) if first == ord("'") else 0
            if stop == 0:
                stop = after
                if code in (OTHER, SPACE):
                    following: int | np.int64 = NEWLINE
                    if after < end:
                        following, size = _read_class(data, after, classes)
                    is_spaced = first == ord(" ")
                    if (
                        (following == LETTER and (cl100k or is_spaced))
                        or (following == OTHER and is_spaced)
                        or (following == NUMBER and is_spaced and spaced_numbers)
                    ):
                        code = following
                        stop = after + size
                if code == LETTER:
                    stop = _find_run_end(data, stop, end, classes, LETTER)
                elif code == OTHER:
                    stop = _find_run_end(data, stop, end, classes, OTHER)
                    if cl100k:
                        stop = _find_run_end(data, stop, end, classes, NEWLINE)
                elif code == NUMBER:
                    num_digits = 1
                    while stop < end and num_digits < max_digits:
                        following, size = _read_class(data, stop, classes)
                        if following != NUMBER:
                            break
                        stop += size
                        num_digits += 1
                else:
                    last = at
                    line_end = stop if code == NEWLINE else 0
                    while stop < end:
                        code, size = _read_class(data, stop, classes)
                        if code not in (SPACE, NEWLINE):
                            break
                        last = stop
                        stop += size
                        if code == NEWLINE:
                            line_end = stop
                    if cl100k and line_end > 0:
                        stop = line_end
                    elif last > at and stop < end:
                        # The last space is left for what follows. If that does not take it, it is alone, and the
                        # place after it cannot be told from the end of a text, where all spaces stay together.
                        not_separable = stop
                        stop = last
            ends[num_pretokens] = stop
            num_pretokens += 1
            at = stop
        counts[row] = num_pretokens - before
    return num_pretokens


@numba.njit(cache=True, nogil=True)
def _find_texts_with_others(data: Bytes, offsets: LongArray, classes: Bytes, found: MaskArray) -> None:
    """The loop of :func:`find_texts_with_others`."""
    for row in range(len(found)):
        at = offsets[row]
        while at < offsets[row + 1]:
            code, size = _read_class(data, at, classes)
            if code == OTHER:
                found[row] = True
                break
            at += size
