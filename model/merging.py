"""The kernels of byte-pair encoding, compiled by numba when first called; :mod:`model.byte_pairs` calls them.

    pretokens -> **known to the thread's cache? -> merged if not** -> tokens -> places

Three tables are open-addressed hash tables in plain arrays: merges by the pair of tokens they join, pretokens met
before (a thread's cache), and pretokens that are one token as a whole. Numbers that meet are of one type, since numba
makes signed and unsigned together a float.
"""

import numba
import numpy as np

from schemas.protocols import IntArray, LongArray, MaskArray
from schemas.records import Bytes

Integer = int | np.int64
Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
Ranks = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
Model = tuple[IntArray, Ranks, Words, Words, IntArray]
"""Tokens of the bytes, merges that cross characters, characters, merges by pair, tokens of the merges."""

Room = tuple[IntArray, IntArray, IntArray, Ranks, Words]
"""Symbols, the next and the previous of each, ranks of its merge with the next, and the heap."""

_MAX_CACHED_BYTES = 256
NO_RANK = np.uint32(0xFFFFFFFF)
FREE = np.uint64(0xFFFFFFFFFFFFFFFF)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX_AGAIN = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ID_BITS = np.uint64(21)
_RANK_BITS = np.uint64(22)
_RANK_MASK = np.uint64((1 << 22) - 1)


@numba.njit(cache=True, nogil=True)
def _mix(value: np.uint64) -> np.uint64:
    value = value * _MIX
    value = (value ^ (value >> _HALF)) * _MIX_AGAIN
    return value ^ (value >> _HALF)


@numba.njit(cache=True, nogil=True)
def add_pairs(pairs: Words, parts: Words) -> bool:
    """Fills the table of merges: an entry holds left id, right id and rank. Returns False if a pair comes twice."""
    mask = np.uint64(len(pairs) - 1)
    for rank in range(len(parts)):
        key = parts[rank, 0] << _ID_BITS | parts[rank, 1]
        slot = _mix(key) & mask
        while pairs[slot] != FREE:
            if pairs[slot] >> _RANK_BITS == key:
                return False
            slot = (slot + np.uint64(1)) & mask
        pairs[slot] = key << _RANK_BITS | np.uint64(rank)
    return True


@numba.njit(cache=True, nogil=True)
def _find_rank(pairs: Words, left: np.int32, right: np.int32) -> np.uint32:
    """Returns the rank of the merge of two tokens, or NO_RANK."""
    mask = np.uint64(len(pairs) - 1)
    key = np.uint64(left) << _ID_BITS | np.uint64(right)
    slot = _mix(key) & mask
    while True:
        entry = pairs[slot]
        if entry >> _RANK_BITS == key:
            return np.uint32(entry & _RANK_MASK)
        if entry == FREE:
            return NO_RANK
        slot = (slot + np.uint64(1)) & mask


@numba.njit(cache=True, nogil=True)
def find_characters(pairs: Words, merged_ids: IntArray, byte_ids: IntArray, characters: Words) -> None:
    """Fills in which characters of two and three bytes become one token, and the last rank on the way.

    Entries are ``rank << 32 | id`` by code point, FREE where there is none.
    """
    for point in range(0x80, len(characters)):
        last = byte_ids[0x80 | point & 0x3F]
        if point < 0x800:
            first = byte_ids[0xC0 | point >> 6]
            rank = highest = _find_rank(pairs, first, last)
        else:
            first, middle = byte_ids[0xE0 | point >> 12], byte_ids[0x80 | point >> 6 & 0x3F]
            left, right = _find_rank(pairs, first, middle), _find_rank(pairs, middle, last)
            highest = min(left, right)
            if highest == NO_RANK:
                continue
            if left < right:
                rank = _find_rank(pairs, merged_ids[left], last)
            else:
                rank = _find_rank(pairs, first, merged_ids[right])
            highest = max(highest, rank)
        if rank != NO_RANK:
            characters[point] = np.uint64(highest) << _HALF | np.uint64(merged_ids[rank])


@numba.njit(cache=True, nogil=True)
def _get_key(words: Words, start: Integer, size: Integer) -> np.uint64:
    """Returns what a pretoken is looked up by: its bytes if there are at most eight of them, else their hash."""
    rest = size
    key = np.uint64(0)
    while rest > 8:
        key = _mix(key ^ words[start])
        start += 8
        rest -= 8
    last = words[start] & (FREE >> np.uint64(64 - 8 * rest))
    return last if size <= 8 else _mix(key ^ last)


@numba.njit(cache=True, nogil=True)
def _find_home(slots: Words, size: Integer, key: np.uint64) -> np.uint64:
    """Returns the first slot of a pretoken to be tried."""
    return _mix(key + np.uint64(size)) & np.uint64(len(slots) // 2 - 1)


@numba.njit(cache=True, nogil=True)
def _find_slot(slots: Words, stored: Words, words: Words, start: Integer, size: Integer, key: np.uint64) -> np.uint64:
    """Returns the slot of a pretoken, or the free one where it belongs.

    A slot holds the key, and in one number the size in bytes, the number of tokens and where ``stored`` has, in words
    of eight bytes, the text if the key is not the text itself, and the ids, two a word. The only id of a short
    pretoken stands in place of that place.
    """
    mask = np.uint64(len(slots) // 2 - 1)
    at = _find_home(slots, size, key)
    while True:
        about = slots[2 * at + np.uint64(1)]
        if about == 0:
            return at
        if slots[2 * at] == key and about & np.uint64(0xFFFF) == np.uint64(size):
            if size <= 8:
                return at
            place = np.int64(about >> _HALF)
            offset = 0
            while offset + 8 < size and stored[place] == words[start + offset]:
                place += 1
                offset += 8
            if offset + 8 >= size:
                last = words[start + offset] & (FREE >> np.uint64(64 - 8 * (size - offset)))
                if stored[place] == last:
                    return at
        at = (at + np.uint64(1)) & mask


@numba.njit(cache=True, nogil=True)
def _fill_slot(
    slots: Words,
    stored: Words,
    used: Integer,
    at: np.uint64,
    words: Words,
    start: Integer,
    size: Integer,
    key: np.uint64,
    token_ids: IntArray,
    count: Integer,
) -> Integer:
    """Stores a pretoken and its tokens in a free slot; see :func:`_find_slot`."""
    place: Integer = np.int64(token_ids[0])
    if size > 8 or count > 1:
        place = used
        if size > 8:
            offset = 0
            while offset + 8 < size:
                stored[used] = words[start + offset]
                used += 1
                offset += 8
            stored[used] = words[start + offset] & (FREE >> np.uint64(64 - 8 * (size - offset)))
            used += 1
        for index in range(0, count, 2):
            word = np.uint64(token_ids[index])
            if index + 1 < count:
                word |= np.uint64(token_ids[index + 1]) << _HALF
            stored[used] = word
            used += 1
    slots[2 * at] = key
    slots[2 * at + np.uint64(1)] = np.uint64(place) << _HALF | np.uint64(count << 16 | size)
    return used


@numba.njit(cache=True, nogil=True)
def _take_slot(slots: Words, stored: Words, at: np.uint64, token_ids: IntArray, first: Integer) -> Integer:
    """Copies the tokens of a slot to ``token_ids[first:]`` and returns their number."""
    about = slots[2 * at + np.uint64(1)]
    size = np.int64(about & np.uint64(0xFFFF))
    count = np.int64(about >> np.uint64(16) & np.uint64(0xFFFF))
    place = np.int64(about >> _HALF)
    if size <= 8:
        if count == 1:
            token_ids[first] = place
            return count
    else:
        place += (size + 7) >> 3
    for index in range(0, count, 2):
        word = stored[place + (index >> 1)]
        token_ids[first + index] = np.int32(word & _LOW)
        if index + 1 < count:
            token_ids[first + index + 1] = np.int32(word >> _HALF)
    return count


@numba.njit(cache=True, nogil=True)
def add_tokens(words: Words, ends: LongArray, token_ids: IntArray, slots: Words, stored: Words) -> None:
    """Fills the table of tokens for pretokens that are one as a whole."""
    start: Integer = np.int64(0)
    used: Integer = np.int64(0)
    for row in range(len(ends)):
        size = ends[row] - start
        key = _get_key(words, start, size)
        at = _find_slot(slots, stored, words, start, size, key)
        used = _fill_slot(slots, stored, used, at, words, start, size, key, token_ids[row : row + 1], np.int64(1))
        start = ends[row]


@numba.njit(cache=True, nogil=True)
def _find_symbols(data: Bytes, start: Integer, size: Integer, model: Model, ids: IntArray) -> Integer:
    """Fills in the tokens that merging starts from and returns their number: single bytes, or whole characters.

    A character can be taken whole if its inner merges all come before any that could join a part of it to a
    neighbour: nothing outside it has an influence until it is one token. In languages without spaces this spares most
    of the work.
    """
    byte_ids, crossings, characters = model[:3]
    count = 0
    at = start
    end = start + size
    while at < end:
        first = np.int64(data[at])
        if 0xC2 <= first < 0xF0 and at + 1 < end:
            length = 2 if first < 0xE0 else 3
            point = (first & 0x1F) << 6 | np.int64(data[at + 1]) & 0x3F
            if length == 3:
                point = (point & 0x3FF) << 6 | np.int64(data[at + 2]) & 0x3F
            entry = characters[point]
            if entry != FREE:
                after = at + length
                rank = np.uint32(entry >> _HALF)
                if (at == start or crossings[np.int64(data[at - 1]) << 8 | first] > rank) and (
                    after >= end or crossings[np.int64(data[after - 1]) << 8 | np.int64(data[after])] > rank
                ):
                    ids[count] = np.int32(entry & _LOW)
                    count += 1
                    at = after
                    continue
        ids[count] = byte_ids[first]
        count += 1
        at += 1
    return count


@numba.njit(cache=True, nogil=True)
def _push(heap: Words, count: Integer, item: np.uint64) -> Integer:
    at = count
    while at > 0 and heap[(at - 1) >> 1] > item:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = item
    return count + 1


@numba.njit(cache=True, nogil=True)
def _pop(heap: Words, count: Integer) -> Integer:
    """Takes the least item off: it is then at ``heap[count - 1]``, just past the heap."""
    least = heap[0]
    count -= 1
    item = heap[count]
    at = 0
    while 2 * at + 1 < count:
        child = 2 * at + 1
        if child + 1 < count and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item
    heap[count] = least
    return count


@numba.njit(cache=True, nogil=True)
def _make_room(size: Integer) -> Room:
    """Returns the arrays that merging a pretoken of this many bytes needs."""
    return (
        np.empty(size, dtype=np.int32),
        np.empty(size, dtype=np.int32),
        np.empty(size, dtype=np.int32),
        np.empty(size, dtype=np.uint32),
        np.empty(3 * size, dtype=np.uint64),
    )


@numba.njit(cache=True, nogil=True)
def _merge_pairs(data: Bytes, start: Integer, size: Integer, model: Model, token_ids: IntArray, room: Room) -> Integer:
    """Joins pairs, the least rank first and the leftmost of equals. Returns the number of tokens.

    Symbols are linked; a heap holds rank and place of every pair there has been, so that a long run costs little more
    a byte than a word.
    """
    pairs, merged_ids = model[3:]
    ids, following, previous, ranks, heap = room
    size = _find_symbols(data, start, size, model, ids)
    count: Integer = np.int64(0)
    for index in range(size):
        following[index] = index + 1
        previous[index] = index - 1
        ranks[index] = _find_rank(pairs, ids[index], ids[index + 1]) if index + 1 < size else NO_RANK
        if ranks[index] != NO_RANK:
            count = _push(heap, count, np.uint64(ranks[index]) << _HALF | np.uint64(index))
    while count > 0:
        count = _pop(heap, count)
        at = np.int64(heap[count] & _LOW)
        rank = np.uint32(heap[count] >> _HALF)
        if ranks[at] != rank:  # an entry from before a neighbour was joined
            continue
        ids[at] = merged_ids[rank]
        gone = following[at]
        ranks[gone] = NO_RANK
        after = following[gone]
        following[at] = after
        ranks[at] = NO_RANK
        if after < size:
            previous[after] = at
            ranks[at] = _find_rank(pairs, ids[at], ids[after])
            if ranks[at] != NO_RANK:
                count = _push(heap, count, np.uint64(ranks[at]) << _HALF | np.uint64(at))
        before = previous[at]
        if before >= 0:
            ranks[before] = _find_rank(pairs, ids[before], ids[at])
            if ranks[before] != NO_RANK:
                count = _push(heap, count, np.uint64(ranks[before]) << _HALF | np.uint64(before))
    count = 0
    at = np.int64(0)
    while at < size:
        token_ids[count] = ids[at]
        count += 1
        at = following[at]
    return count


@numba.njit(cache=True, nogil=True)
def encode_pretokens(
    data: Bytes,
    words: Words,
    ends: LongArray,
    separable: MaskArray,
    counts: LongArray,
    model: Model,
    whole: tuple[Words, Words],
    cache: tuple[Words, Words, LongArray],
    token_ids: IntArray,
    token_separable: MaskArray,
    offsets: LongArray,
) -> None:
    """Encodes the pretokens of texts one after the other; fills token_ids, token_separable and offsets."""
    whole_slots, whole_words = whole
    slots, stored, used = cache
    max_items = len(slots) // 4
    room = _make_room(np.int64(_MAX_CACHED_BYTES))
    # A literal 0 would have numba compile every kernel that it is handed to twice.
    first: Integer = np.int64(0)
    start: Integer = np.int64(0)
    pretoken = 0
    for row in range(len(counts)):
        for _ in range(counts[row]):
            end = ends[pretoken]
            size = end - start
            token_separable[first] = separable[pretoken]
            key = _get_key(words, start, size)
            is_short = size <= _MAX_CACHED_BYTES
            at = _find_slot(slots, stored, words, start, size, key) if is_short else np.uint64(0)
            if is_short and slots[2 * at + np.uint64(1)] != 0:
                count = _take_slot(slots, stored, at, token_ids, first)
            else:
                count = 0
                if len(whole_words) > 0:
                    known = _find_slot(whole_slots, whole_words, words, start, size, key)
                    if whole_slots[2 * known + np.uint64(1)] != 0:
                        count = _take_slot(whole_slots, whole_words, known, token_ids, first)
                if count == 0:
                    if size > len(room[0]):
                        room = _make_room(size)
                    count = _merge_pairs(data, start, size, model, token_ids[first:], room)
                if is_short:
                    if used[0] >= max_items or used[1] + size // 8 + count // 2 + 2 > len(stored):
                        slots[:] = 0  # full: begin anew, what is common will soon be back
                        used[:] = 0
                        at = _find_home(slots, size, key)
                    used[0] += 1
                    used[1] = _fill_slot(slots, stored, used[1], at, words, start, size, key, token_ids[first:], count)
            for index in range(first + 1, first + count):
                token_separable[index] = False
            first += count
            start = end
            pretoken += 1
        offsets[row + 1] = first


@numba.njit(cache=True, nogil=True)
def find_places(token_ids: IntArray, offsets: LongArray, sizes: IntArray, starts: LongArray, ends: LongArray) -> None:
    """Fills where each token starts and ends in its text, from the tokens' sizes."""
    for row in range(len(offsets) - 1):
        place = np.int64(0)
        for index in range(offsets[row], offsets[row + 1]):
            starts[index] = place
            place += sizes[token_ids[index]]
            ends[index] = place
