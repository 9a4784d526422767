"""Presets of the filters: whole sets of bounds by name.

    settings -> **bounds** -> filters (:mod:`pipelines.filtering`) of the records that were read

A preset is a whole :class:`~pipelines.filtering.FilterConfig`; settings of the user's go on top of it.
"""

from collections.abc import Callable, Mapping

from pipelines.filtering import FilterConfig


def no_filters() -> FilterConfig:
    """Keeps everything."""
    return FilterConfig()


def paper_filters() -> FilterConfig:
    """The rules of method section 3 with the bounds of Gopher's table A1, for large mixed corpora of any language.

    The paper names the share of distinct words and the entropy without a bound: theirs are choices. Rules that hold for
    one language or for prose only (stop words, sentences, curly brackets) are off.
    """
    return FilterConfig(
        min_words=50,
        max_words=100_000,
        min_mean_word_chars=3.0,
        max_mean_word_chars=10.0,
        max_non_alphabetic_share=0.7,
        min_alphabetic_piece_share=0.8,
        max_distinct_word_share=0.9,
        min_entropy_bits=4.0,
        max_hashes_per_word=0.1,
        max_ellipses_per_word=0.1,
        max_bullet_line_share=0.9,
        max_ellipsis_line_share=0.3,
        max_lorem_ipsum=0,
        max_duplicate_line_share=0.3,
        max_duplicate_line_char_share=0.2,
        max_duplicate_paragraph_share=0.3,
        max_duplicate_paragraph_char_share=0.2,
        max_top_2gram_char_share=0.2,
        max_top_3gram_char_share=0.18,
        max_top_4gram_char_share=0.16,
        max_duplicate_5gram_char_share=0.15,
        max_duplicate_6gram_char_share=0.14,
        max_duplicate_7gram_char_share=0.13,
        max_duplicate_8gram_char_share=0.12,
        max_duplicate_9gram_char_share=0.11,
        max_duplicate_10gram_char_share=0.1,
    )


def technical_filters() -> FilterConfig:
    """For short technical documents: reference pages, docstrings, code and tables.

    Drops what is nearly empty, nearly without letters, or nearly all repetition.
    """
    return FilterConfig(
        min_words=5,
        max_mean_word_chars=20.0,
        max_non_alphabetic_share=0.7,
        min_entropy_bits=1.5,
        max_ellipses_per_word=0.3,
        max_ellipsis_line_share=0.5,
        max_duplicate_line_char_share=0.6,
        max_duplicate_paragraph_char_share=0.6,
        max_top_2gram_char_share=0.5,
        max_duplicate_10gram_char_share=0.6,
    )


FILTER_PRESETS: Mapping[str, Callable[[], FilterConfig]] = {
    "none": no_filters,
    "paper": paper_filters,
    "technical": technical_filters,
}
"""The presets by the names users give."""
