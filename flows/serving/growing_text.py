"""The text of tokens that come one by one: whole letters only, up to a stop sequence.

Where it stands: between a batch, which chooses tokens, and the responses, which send text.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How the tokenizer writes a letter of which it has not seen all bytes."""


class GrowingText:
    """Turns tokens into pieces of text.

    A piece is given out when it is certain: its letters are whole, and it is not the beginning of a stop sequence.

    Attributes:
        is_stopped: whether a stop sequence was found; the text ends before it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, trims_start: bool = False
    ) -> None:
        """Begins without text.

        Args:
            decode: the tokenizer's.
            stops: sequences that end the text; none is empty.
            trims_start: leave out the white space that it begins with.
        """
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._known = 0  # of the first tokens the text is known; they stay as what the next ones are decoded behind
        self._held = ""
        self._trims = trims_start
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Takes the next token and returns the text that has become certain; it may be empty."""
        if self.is_stopped:
            return ""
        self._tokens.append(token)
        before, whole = self._decode(self._tokens[: self._known]), self._decode(self._tokens)
        if whole.endswith(UNFINISHED):
            return ""
        self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
        return self._pass_on(whole[len(before) :])

    def finish(self) -> str:
        """Returns what was held back; nothing more is added."""
        if self.is_stopped:
            return ""
        before, whole = self._decode(self._tokens[: self._known]), self._decode(self._tokens)
        self._tokens = []
        text = self._pass_on(whole[len(before) :]) + self._held
        self._held = ""
        return text

    def _pass_on(self, text: str) -> str:
        self._held += text
        if self._trims:
            self._held = self._held.lstrip()
            self._trims = not self._held
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            text, self._held, self.is_stopped = self._held[: min(places)], "", True
            return text
        num_held = max((_count_begun(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - num_held], self._held[len(self._held) - num_held :]
        return text


def _count_begun(text: str, stop: str) -> int:
    """Returns how many letters at the end of a text may be the beginning of a stop sequence."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
