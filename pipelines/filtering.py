"""Filters: what of a corpus is worth keeping, by rules that each give their reason.

    records (:mod:`pipelines.reading`) -> **kept and dropped records** -> references (:mod:`pipelines.chunking`)

A rule is a measure of a text (:mod:`pipelines.measuring`) and a bound, and all rules are one table, :data:`RULES`. The
first rule of the table that a text fails is the reason why it is dropped. A measure depends on its text alone, so
nothing depends on batches. The rules are those of method section 3, of Rae et al. 2021 (Gopher, arXiv 2112.11446, table
A1) and of Raffel et al. 2020 (C4, arXiv 1910.10683, section 2.2); whole sets of bounds are in
:mod:`pipelines.filter_presets`.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.measuring import MEASURES, compute_measures
from pipelines.repetition import DUPLICATE_SIZES, TOP_SIZES, Floats
from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The bound of every rule; None switches a rule off, and without arguments all are off.

    A value at its bound passes. Shares lie between 0 and 1. What is measured says :data:`pipelines.measuring.MEASURES`.

    Attributes:
        min_words: fewest words.
        max_words: most words.
        min_mean_word_chars: shortest mean word; like the next only for texts in scripts with spaces.
        max_mean_word_chars: longest mean word.
        max_non_alphabetic_share: most characters that are no letters.
        min_alphabetic_piece_share: fewest pieces between white space that have a letter.
        max_distinct_word_share: most distinct words.
        min_entropy_bits: least entropy of the words.
        max_hashes_per_word: most ``#`` a word.
        max_ellipses_per_word: most ellipses a word.
        max_bullet_line_share: most lines that begin with a bullet.
        max_ellipsis_line_share: most lines that end in an ellipsis.
        min_stop_words: fewest different words of :data:`pipelines.measuring.STOP_WORDS`; for English only.
        min_sentences: fewest sentences; not for languages without marks between them, such as Thai.
        min_lines: fewest lines that are not blank.
        max_lorem_ipsum: most occurrences of "lorem ipsum".
        max_curly_brackets: most opening curly brackets; C4 allows none, which drops most code.
        max_javascript_line_share: most lines that name JavaScript.
        max_duplicate_line_share: most lines that repeat an earlier one.
        max_duplicate_line_char_share: most characters in them.
        max_duplicate_paragraph_share: most paragraphs that repeat an earlier one.
        max_duplicate_paragraph_char_share: most characters in them.
        max_top_2gram_char_share: most characters in the occurrences of the most frequent run of two words.
        max_top_3gram_char_share: the same for three words.
        max_top_4gram_char_share: the same for four words.
        max_duplicate_5gram_char_share: most characters in repetitions of runs of five words.
        max_duplicate_6gram_char_share: the same for six words.
        max_duplicate_7gram_char_share: the same for seven words.
        max_duplicate_8gram_char_share: the same for eight words.
        max_duplicate_9gram_char_share: the same for nine words.
        max_duplicate_10gram_char_share: the same for ten words.
    """

    min_words: int | None = None
    max_words: int | None = None
    min_mean_word_chars: float | None = None
    max_mean_word_chars: float | None = None
    max_non_alphabetic_share: float | None = None
    min_alphabetic_piece_share: float | None = None
    max_distinct_word_share: float | None = None
    min_entropy_bits: float | None = None
    max_hashes_per_word: float | None = None
    max_ellipses_per_word: float | None = None
    max_bullet_line_share: float | None = None
    max_ellipsis_line_share: float | None = None
    min_stop_words: int | None = None
    min_sentences: int | None = None
    min_lines: int | None = None
    max_lorem_ipsum: int | None = None
    max_curly_brackets: int | None = None
    max_javascript_line_share: float | None = None
    max_duplicate_line_share: float | None = None
    max_duplicate_line_char_share: float | None = None
    max_duplicate_paragraph_share: float | None = None
    max_duplicate_paragraph_char_share: float | None = None
    max_top_2gram_char_share: float | None = None
    max_top_3gram_char_share: float | None = None
    max_top_4gram_char_share: float | None = None
    max_duplicate_5gram_char_share: float | None = None
    max_duplicate_6gram_char_share: float | None = None
    max_duplicate_7gram_char_share: float | None = None
    max_duplicate_8gram_char_share: float | None = None
    max_duplicate_9gram_char_share: float | None = None
    max_duplicate_10gram_char_share: float | None = None

    def __post_init__(self) -> None:
        """Checks the bounds.

        Raises:
            InputError: a bound is no number, below 0 or, for a share, above 1; or a least is above its most.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"filters: {field.name} is {value!r}, must be a number or null")
            highest = 1.0 if field.name.endswith("_share") else math.inf
            if not 0 <= value <= highest or math.isinf(value):
                bound = "between 0 and 1" if highest == 1.0 else "a finite number of at least 0"
                raise InputError(f"filters: {field.name} is {value}, must be {bound}")
        for name in ("words", "mean_word_chars"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise InputError(f"filters: min_{name} is {least}, must be at most max_{name}, {most}")


class Rule(NamedTuple):
    """One rule.

    Attributes:
        name: the reason of what it drops.
        measure: what it looks at, a key of :data:`pipelines.measuring.MEASURES`.
        field: its bound, a field of :class:`FilterConfig`.
        is_minimum: True if a text is dropped below the bound, False if above.
    """

    name: str
    measure: str
    field: str
    is_minimum: bool


RULES = (
    Rule("too_few_words", "words", "min_words", True),
    Rule("too_many_words", "words", "max_words", False),
    Rule("short_words", "mean_word_chars", "min_mean_word_chars", True),
    Rule("long_words", "mean_word_chars", "max_mean_word_chars", False),
    Rule("too_few_letters", "non_alphabetic_share", "max_non_alphabetic_share", False),
    Rule("too_few_alphabetic_pieces", "alphabetic_piece_share", "min_alphabetic_piece_share", True),
    Rule("too_many_distinct_words", "distinct_word_share", "max_distinct_word_share", False),
    Rule("low_entropy", "entropy_bits", "min_entropy_bits", True),
    Rule("too_many_hashes", "hashes_per_word", "max_hashes_per_word", False),
    Rule("too_many_ellipses", "ellipses_per_word", "max_ellipses_per_word", False),
    Rule("too_many_bullet_lines", "bullet_line_share", "max_bullet_line_share", False),
    Rule("too_many_ellipsis_lines", "ellipsis_line_share", "max_ellipsis_line_share", False),
    Rule("too_few_stop_words", "stop_words", "min_stop_words", True),
    Rule("too_few_sentences", "sentences", "min_sentences", True),
    Rule("too_few_lines", "lines", "min_lines", True),
    Rule("lorem_ipsum", "lorem_ipsum", "max_lorem_ipsum", False),
    Rule("curly_brackets", "curly_brackets", "max_curly_brackets", False),
    Rule("javascript", "javascript_line_share", "max_javascript_line_share", False),
    Rule("duplicate_lines", "duplicate_line_share", "max_duplicate_line_share", False),
    Rule("duplicate_line_chars", "duplicate_line_char_share", "max_duplicate_line_char_share", False),
    Rule("duplicate_paragraphs", "duplicate_paragraph_share", "max_duplicate_paragraph_share", False),
    Rule("duplicate_paragraph_chars", "duplicate_paragraph_char_share", "max_duplicate_paragraph_char_share", False),
    *(Rule(f"top_{n}gram", f"top_{n}gram_char_share", f"max_top_{n}gram_char_share", False) for n in TOP_SIZES),
    *(
        Rule(f"duplicate_{n}grams", f"duplicate_{n}gram_char_share", f"max_duplicate_{n}gram_char_share", False)
        for n in DUPLICATE_SIZES
    ),
)
"""All rules, in the order in which a text is judged."""


class ActiveRule(NamedTuple):
    """A rule that a configuration switches on.

    Attributes:
        name: the reason of what it drops.
        what: what it measures, in words.
        direction: ``at least`` or ``at most``.
        bound: the outermost value that passes.
    """

    name: str
    what: str
    direction: str
    bound: float


def list_rules(config: FilterConfig) -> list[ActiveRule]:
    """Returns the rules that are on, in the order in which a text is judged."""
    return [
        ActiveRule(
            rule.name,
            MEASURES[rule.measure].what,
            "at least" if rule.is_minimum else "at most",
            getattr(config, rule.field),
        )
        for rule in RULES
        if getattr(config, rule.field) is not None
    ]


def measure_texts(texts: pa.Array, config: FilterConfig) -> dict[str, Floats]:
    """Measures what the active rules ask for.

    Args:
        texts: N strings; null counts as blank.
        config: the rules.

    Returns:
        Measures (N,) by their names in :data:`pipelines.measuring.MEASURES`, in the order of the rules.
    """
    names = [rule.measure for rule in RULES if getattr(config, rule.field) is not None]
    return compute_measures(texts, names)


def filter_records(records: pa.RecordBatch, config: FilterConfig) -> pa.RecordBatch:
    """Makes rejects of the kept records that fail a rule.

    Args:
        records: a batch of :data:`pipelines.records.RECORDS`.
        config: the rules.

    Returns:
        As many records in the same order. A dropped one has the first failing rule's name for its reason, its value and
        bound, and neither text, content hash nor sizes; rejects are as they were. The batch itself if nothing is
        dropped.
    """
    kept = np.flatnonzero(records["reason"].is_null())
    measures = measure_texts(records["text"].take(pa.array(kept)), config) if len(kept) else {}
    failed = np.full(records.num_rows, -1)
    for number, rule in reversed(list(enumerate(RULES))):
        bound = getattr(config, rule.field)
        if bound is not None and measures:
            values = measures[rule.measure]
            failed[kept[values < bound if rule.is_minimum else values > bound]] = number
    dropped = np.flatnonzero(failed >= 0)
    if not len(dropped):
        return records
    rules = [RULES[number] for number in failed[dropped]]
    places = np.searchsorted(kept, dropped)
    failing = [float(measures[rule.measure][place]) for rule, place in zip(rules, places, strict=True)]
    bounds = [float(getattr(config, rule.field)) for rule in rules]
    changes = {
        "text": [None] * len(rules),
        "content_hash": [None] * len(rules),
        "size_bytes": [0] * len(rules),
        "num_chars": [0] * len(rules),
        "reason": [rule.name for rule in rules],
        "detail": list(map(_describe_failure, rules, failing, bounds)),
        "value": failing,
        "threshold": bounds,
    }
    mask = pa.array(failed >= 0)
    columns = [
        pc.replace_with_mask(column, mask, pa.array(changes[field.name], field.type))
        if field.name in changes
        else column
        for field, column in zip(records.schema, records.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=records.schema)


def _describe_failure(rule: Rule, value: float, bound: float) -> str:
    direction = "at least" if rule.is_minimum else "at most"
    return f"the {MEASURES[rule.measure].what} is {value:.6g}, must be {direction} {bound:.6g}"
