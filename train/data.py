"""Labelled texts in three splits: the embedded corpus, a dataset on the hub, or a folder of CSV files."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants

from lora.errors import UserError, first_line
from train.bbc import Rows, is_bbc, read_bbc

AG_NEWS_ON_HUB = "fancyzhx/ag_news"
DATA_HELP = "bbc, bbc:CLASS,CLASS (some of its classes), ag_news, a dataset on the hub, or a folder of CSVs"


class DataError(UserError, ValueError):
    """Data that cannot be read or used. The message names the file, the line and the problem."""


@dataclass(frozen=True)
class News:
    """Three splits, each with `text` (str) and `label` (an index into `labels`)."""

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]

    def digest(self) -> str:
        """The SHA-256 over every row of every split, which identifies the data of a run."""
        sha = hashlib.sha256(repr(self.labels).encode())
        for split in (self.train, self.validation, self.test):
            for text, label in zip(split["text"], split["label"], strict=True):
                sha.update(f"{label} {len(text)} {text}".encode())
            sha.update(b"end of split")
        return sha.hexdigest()


def load_news(name: str, validation_fraction: float, seed: int, max_train_examples: int = 0) -> News:
    """Loads labelled news by name: "bbc" (embedded), "ag_news" or another dataset on the hub, or a folder.

    "bbc:politics,tech" is bbc with these classes alone, in the order of the corpus; each article is in the
    same split. A folder contains train.csv and test.csv, either in AG's format (class from 1, title,
    description, class names in classes.txt, no header or Kaggle's) or with a header `text,label`.
    Validation rows are split off the training rows, stratified and by `seed`; bbc has fixed ones.
    max_train_examples: the number of training rows to keep, drawn by `seed`; 0 keeps all.

    Raises DataError.
    """
    if is_bbc(name):
        rows, labels = read_bbc()
        if ":" in name:
            rows, labels = _some_classes(name, rows, labels)
        parts = {split: _dataset(texts, classes, labels) for split, (texts, classes) in rows.items()}
        train, validation, test = parts["train"], parts["validation"], parts["test"]
        _refuse_too_few(name, train, labels)
    else:
        train, test, labels = _read_folder(Path(name)) if Path(name).is_dir() else _read_hub(name)
        _refuse_too_few(name, train, labels)
        # As many rows as classes on both sides, without which a stratified split is refused.
        size = min(max(round(validation_fraction * len(train)), len(labels)), len(train) - len(labels))
        parts = train.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
        train, validation = parts["train"], parts["test"]
        for index in set(range(len(labels))) - set(train["label"]):
            raise DataError(
                f"{name}: validation_fraction {validation_fraction} leaves {labels[index]!r} no training row"
            )
    if max_train_examples and max_train_examples < len(train):
        train = train.shuffle(seed=seed).select(range(max_train_examples))
    return News(train, validation, test, labels)


def load_test(name: str, labels: tuple[str, ...]) -> Dataset:
    """The test split alone, its classes as indices into `labels`; a folder needs test.csv alone.

    Raises DataError, also if a class is not one of `labels`.
    """
    found: tuple[str, ...]
    if Path(name).is_dir() and not is_bbc(name):
        names = _class_names(Path(name) / "classes.txt")
        texts, classes = _read_csv(Path(name) / "test.csv", names, names)
        found = names or tuple(sorted(set(classes)))
    else:
        if is_bbc(name):
            news = load_news(name, validation_fraction=0.1, seed=0)
            test, found = news.test, news.labels
        else:
            _, test, found = _read_hub(name)
        texts, classes = list(test["text"]), [found[index] for index in test["label"]]
    if not set(found) <= set(labels):
        raise DataError(f"{name}: its classes are {', '.join(found)}; the model knows {', '.join(labels)}")
    return _dataset(texts, [labels.index(name) for name in classes], labels)


def _some_classes(
    name: str, rows: dict[str, Rows], labels: tuple[str, ...]
) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The rows of the classes that the name has after its colon, by split, and these classes."""
    asked = name.partition(":")[2].split(",")
    for label, count in Counter(asked).items():
        if label not in labels:
            raise DataError(f"{name}: class {label!r} is not one of {', '.join(labels)}")
        if count > 1:
            raise DataError(f"{name}: class {label!r} is given twice")
    kept = tuple(label for label in labels if label in asked)
    index = {labels.index(label): position for position, label in enumerate(kept)}
    some = {}
    for split, (texts, classes) in rows.items():
        pairs = [(text, index[old]) for text, old in zip(texts, classes, strict=True) if old in index]
        some[split] = [text for text, _ in pairs], [new for _, new in pairs]
    return some, kept


def _refuse_too_few(name: str, train: Dataset, labels: tuple[str, ...]) -> None:
    if len(labels) < 2:
        raise DataError(f"{name}: it has a single class, {labels[0]!r}; a classifier needs two or more")
    counts = Counter(train["label"])
    if len(train) < 2 * len(labels):
        raise DataError(
            f"{name}: {len(train)} training rows for {len(labels)} classes; at least 2 per class are needed"
        )
    for index, label in enumerate(labels):
        if counts[index] < 2:
            raise DataError(
                f"{name}: class {label!r} has {counts[index]} training rows; at least 2 are needed to "
                "divide them"
            )


def _read_folder(folder: Path) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    names = _class_names(folder / "classes.txt")
    train_texts, train_classes = _read_csv(folder / "train.csv", names, names)
    labels = names or tuple(
        sorted(set(train_classes), key=lambda name: (len(name), name) if name.isdecimal() else (0, name))
    )
    test_texts, test_classes = _read_csv(folder / "test.csv", names, labels)
    index = {label: position for position, label in enumerate(labels)}
    return (
        _dataset(train_texts, [index[name] for name in train_classes], labels),
        _dataset(test_texts, [index[name] for name in test_classes], labels),
        labels,
    )


def _class_names(path: Path) -> tuple[str, ...]:
    """The lines of classes.txt, or nothing if there is no such file."""
    if not path.is_file():
        return ()
    names = tuple(line.strip() for line in _decode(path).rstrip().split("\n"))
    if names == ("",):
        raise DataError(f"{path}: it lists no class")
    if "" in names:
        raise DataError(f"{path}:{names.index('') + 1}: an empty line; line n names class n")
    if len(set(names)) != len(names):
        raise DataError(f"{path}: it lists a class twice")
    return names


def _read_csv(path: Path, names: tuple[str, ...], known: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The texts and class names of one file.

    names: what the class numbers of AG's format mean; if empty, a number is its own name. known: the class
    names to allow; if empty, all are allowed.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; a data folder contains train.csv and test.csv")
    texts: list[str] = []
    classes: list[str] = []
    csv.field_size_limit(2**31 - 1)  # the limit is global; the default refuses texts of 128 KiB
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    header: list[str] | None = None
    line = 1  # the first line of the row; the reader counts the last one
    try:
        for row in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not row:
                continue
            if header is None:
                header = [cell.strip().lower() for cell in row]
                if sorted(header) == ["label", "text"]:
                    continue
                if header == ["class index", "title", "description"]:  # AG's format as Kaggle has it
                    header = []
                    continue
                if {"label", "text"} < set(header):
                    raise DataError(f"{where}: the header is {','.join(header)} instead of text,label alone")
                header = []
            if header:
                text, name = _labelled_row(where, row, header, known)
            else:
                text, name = _ag_row(where, row, names, known)
            if not text:
                raise DataError(f"{where}: the text is empty")
            texts.append(text)
            classes.append(name)
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from error
    if not texts:
        raise DataError(f"{path}: it has no rows")
    return texts, classes


def _labelled_row(where: str, row: list[str], header: list[str], known: tuple[str, ...]) -> tuple[str, str]:
    if len(row) != 2:
        raise DataError(f"{where}: {len(row)} columns, and the header has 2")
    text, name = row[header.index("text")].strip(), row[header.index("label")].strip()
    if not name:
        raise DataError(f"{where}: the label is empty")
    if known and name not in known:
        raise DataError(f"{where}: class {name!r} is not one of {', '.join(known)}")
    return text, name


def _ag_row(where: str, row: list[str], names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str]:
    if len(row) != 3:
        raise DataError(
            f"{where}: {len(row)} columns instead of class, title, description (or give a header text,label)"
        )
    number, title, description = (cell.strip() for cell in row)
    allowed = f"1..{len(names)}" if names else ", ".join(known) or "1, 2, 3, …"
    is_number = re.fullmatch("[1-9][0-9]{0,5}", number)
    if not is_number or (int(number) > len(names) if names else known and number not in known):
        raise DataError(f"{where}: class {number!r} is not one of {allowed}")
    # Joined as in the hub's ag_news.
    return " ".join(filter(None, (title, description))), names[int(number) - 1] if names else number


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8") from error


def _read_hub(name: str) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    if Path(name).is_file():
        raise DataError(f"{name}: this is a file; give the folder that contains train.csv and test.csv")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: there is no such folder")
    name = AG_NEWS_ON_HUB if name == "ag_news" else name
    splits = _fetch(name)
    for split in ("train", "test"):
        if split not in splits:
            raise DataError(f"{name}: no split {split!r}; there are {', '.join(splits)}")
        if not len(splits[split]):
            raise DataError(f"{name}: the split {split!r} has no rows")
        for column in ("text", "label"):
            if column not in splits[split].column_names:
                raise DataError(
                    f"{name}: no column {column!r}; there are {', '.join(splits[split].column_names)}"
                )
    label = splits["train"].features["label"]
    if isinstance(label, ClassLabel):
        labels = tuple(label.names)
    else:
        for row, value in enumerate(splits["train"]["label"]):
            if not isinstance(value, str | int | float):
                raise DataError(f"{name}, train row {row}: the label {value!r} is not one class")
        labels = tuple(str(value) for value in sorted(splits["train"].unique("label")))
    by_value: dict[Any, int] = {value: index for index, value in enumerate(labels)}
    found = []
    for split in ("train", "test"):
        classes = []
        for row, (text, value) in enumerate(zip(splits[split]["text"], splits[split]["label"], strict=True)):
            index = value if isinstance(label, ClassLabel) else by_value.get(str(value), -1)
            if not isinstance(index, int) or not 0 <= index < len(labels):
                raise DataError(
                    f"{name}, {split} row {row}: class {value!r} is not one of {', '.join(labels)}"
                )
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{name}, {split} row {row}: the text is empty")
            classes.append(index)
        found.append(_dataset(list(splits[split]["text"]), classes, labels))
    return found[0], found[1], labels


def _fetch(name: str) -> Any:
    """The dataset from the hub, or from its cache."""
    try:
        try:
            HfApi().dataset_info(name, timeout=10)  # fails at once; the download would retry
        except Exception as error:
            return _from_cache(name, error)
        return datasets.load_dataset(name)
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f"{name}: there is no such folder, no such dataset in the hub's cache, and "
            f"{hub_constants.ENDPOINT} did not provide it ({reason}); without the hub, use --data FOLDER "
            "with train.csv and test.csv, or --data bbc, the embedded news"
        ) from error


def _from_cache(name: str, unreachable: Exception) -> Any:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # otherwise load_dataset retries for half a minute
    try:
        return datasets.load_dataset(name)
    except Exception:
        raise unreachable from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _dataset(texts: list[str], classes: list[int], labels: tuple[str, ...]) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(labels))})
    return Dataset.from_dict({"text": texts, "label": classes}, features=features)
