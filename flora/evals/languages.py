"""Which language a short snippet is written in, and the demo's text split for that question.

The detector is a naive Bayes classifier on the sets of n-grams of a snippet, of its characters, of
its words and of its shape (every word one letter). It learns from text that no adapter trains on,
and from a few built-in lines of each language.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from flora.errors import UsageError
from flora.evals.idioms import IDIOMS

# Smoothing: the share of the mean over all languages in each language's probabilities.
_SHARED = 0.05
_LARGEST_NGRAM = 5
# Characters taken of a language: far more of one than of another would favour it.
_ENOUGH = 8_000

# One stretch of text in forty, the last three of each ten of them held out.
_STRETCHES = 40
_SMALLEST_STRETCH = 300
_HELD_OUT = (7, 8, 9)

_WORD = re.compile(r"[^\W\d]+|\n|[^\w\s]|\d")
_BLOCK_COMMENT = re.compile(
    r"/\*[\s*].*?\*/|\(\*[\s*].*?\*\)|^=begin\b.*?^=end\b|^=[a-z].*?^=cut$",
    re.DOTALL | re.MULTILINE,
)
_COMMENT_LINE = re.compile(r"\s*(?:#[#\s]|//|/\*|\*[\s/*]|;|--|\(\*)")
_COMMENT_TEXT = re.compile(
    r"(^[ \t]*(?:--+|;+|/?\*+|\(\*+)|(?:^|[ \t])(?:#+|//+)) .*$", re.MULTILINE
)
# A comment of so many lines is a licence or an essay.
_LONG_COMMENT = 3


class Split(NamedTuple):
    """Each language's stretches of text; the two halves share none."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]


def split(folder: Path, languages: Sequence[str] | None = None) -> Split:
    """Seven tenths of each language's text to train adapters on, three tenths for the detector.

    Comments of three lines and more are left out. The same folder always gives the same split.

    Args:
        folder: `<language>/<files>`, such as `flora.assets.demo_text()`.
        languages: which of them; all where it is None.

    Raises:
        UsageError: there is no such folder, or it has no files for a language.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give one of <language>/<files>")
    if languages is None:
        languages = sorted(path.name for path in folder.iterdir() if path.is_dir())
    parts = Split({}, {})
    for language in languages:
        files = sorted(path for path in (folder / language).glob("*") if path.is_file())
        if not files:
            raise UsageError(
                f"{folder / language} has no files: give a folder of <language>/<files>"
            )
        text = "".join(_code(path.read_text(encoding="utf-8", errors="replace")) for path in files)
        parts.train[language], parts.held_out[language] = _halves(text)
    return parts


def _halves(text: str) -> tuple[list[str], list[str]]:
    train: list[str] = []
    held_out: list[str] = []
    stretches = enumerate(_stretches(text, max(_SMALLEST_STRETCH, len(text) // _STRETCHES)))
    for held, group in itertools.groupby(stretches, lambda item: item[0] % 10 in _HELD_OUT):
        (held_out if held else train).append("".join(stretch for _, stretch in group))
    return train, held_out


def _stretches(text: str, size: int) -> Iterator[str]:
    """`text` cut at ends of lines, each piece of at least `size` characters but the last."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece:
        yield piece


def _code(text: str) -> str:
    """`text` without its long comments."""
    text = _BLOCK_COMMENT.sub(
        lambda found: "" if found[0].count("\n") + 1 >= _LONG_COMMENT else found[0], text
    )
    kept: list[str] = []
    lines = text.splitlines(keepends=True)
    for comment, group in itertools.groupby(lines, lambda line: bool(_COMMENT_LINE.match(line))):
        run = list(group)
        if not comment or len(run) < _LONG_COMMENT:
            kept += run
    return "".join(kept)


class LanguageDetector:
    """Names the language of a short snippet; plain English is `text`."""

    def __init__(self) -> None:
        self._languages: tuple[str, ...] = ()
        self._evidence: dict[str, dict[str, float]] = {}

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages it can name, in alphabetical order; none before `fit`."""
        return self._languages

    def fit(self, texts: Mapping[str, Sequence[str]]) -> Self:
        """Learns from each language's texts and from `IDIOMS`, and returns itself.

        It knows the languages of both; either alone is enough for a language.
        """
        shares = {
            language: _shares(texts.get(language, ()), IDIOMS.get(language, ""))
            for language in sorted({*texts, *IDIOMS})
        }
        mean: defaultdict[str, float] = defaultdict(float)
        for own in shares.values():
            for feature, share in own.items():
                mean[feature] += share / len(shares)
        self._languages = tuple(shares)
        self._evidence = {feature: {} for feature in mean}
        for language, own in shares.items():
            for feature, share in own.items():
                ratio = (1 - _SHARED) * share / mean[feature] + _SHARED
                self._evidence[feature][language] = math.log(ratio)
        return self

    def scores(self, text: str) -> dict[str, float]:
        """Each language's log likelihood of `text`, up to a constant; more is likelier.

        Raises:
            UsageError: the detector was not fitted.
        """
        if not self._languages:
            raise UsageError("the detector knows no language yet: call fit first")
        totals = dict.fromkeys(self._languages, 0.0)
        absent = math.log(_SHARED)
        for feature in set(_features(text)):
            if (evidence := self._evidence.get(feature)) is not None:
                for language in totals:
                    totals[language] += evidence.get(language, absent)
        return totals

    def detect(self, text: str) -> str:
        """The likeliest language of `text`; `text` where nothing in it tells.

        Raises:
            UsageError: the detector was not fitted.
        """
        scores = self.scores(text)
        return max(scores, key=lambda language: (scores[language], language == "text"))


def _shares(texts: Sequence[str], idioms: str) -> dict[str, float]:
    """Each feature's share of all, the texts and the idioms counting alike."""
    whole = "".join(texts)
    pieces = list(_stretches(whole, _SMALLEST_STRETCH))
    sample = pieces[:: max(1, math.ceil(len(whole) / _ENOUGH))]
    counts = [
        Counter(itertools.chain.from_iterable(map(_features, sample))),
        Counter(_features(idioms)),
    ]
    shares: defaultdict[str, float] = defaultdict(float)
    known = [count for count in counts if count]
    for count in known:
        total = count.total()
        for feature, times in count.items():
            shares[feature] += times / total / len(known)
    return shares


def _features(text: str) -> Iterator[str]:
    # Neither what a comment says nor how wide an indentation is belongs to a language.
    text = _COMMENT_TEXT.sub(r"\1", text).strip()
    if not text:
        return
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", re.sub(r"\d+", "0", f"\n{text}\n")))
    yield from _ngrams(text, "", 1)
    shape = re.sub(r"[A-Z]\w*", "W", re.sub(r"\b[^\W\dA-Z]\w*", "w", text))
    yield from _ngrams(shape, "shape:", 3)
    words = _WORD.findall(text)
    yield from (f"word:{word}" for word in words)
    yield from (f"pair:{first} {second}" for first, second in itertools.pairwise(words))


def _ngrams(text: str, prefix: str, smallest: int) -> Iterator[str]:
    for size in range(smallest, _LARGEST_NGRAM + 1):
        for start in range(len(text) - size + 1):
            yield prefix + text[start : start + size]
