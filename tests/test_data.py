"""News: every bad row names its file and line; splits are what they say."""

from collections import Counter

import pytest
from datasets import Dataset

from train.bbc import DUPLICATES, find_duplicates, read_articles
from train.data import DataError, load_news

AG_ROW = '"1","Title","Some text"\n'
GOOD_AG = '"1","T","war and peace"\n"2","T","goal"\n"1","T","vote"\n"2","T","match"\n'
GOOD = "text,label\na goal,sport\na bank,money\na match,sport\na share,money\n"


def load(tmp_path, train, test=None, classes=None):
    for name, content in (("train.csv", train), ("test.csv", test or train), ("classes.txt", classes)):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_news(str(tmp_path), validation_fraction=0.5, seed=0)


def test_both_formats_are_read(tmp_path):
    news = load(tmp_path, GOOD)
    assert news.labels == ("money", "sport")
    assert sorted(news.test["text"]) == ["a bank", "a goal", "a match", "a share"]
    (tmp_path / "ag").mkdir()
    news = load(tmp_path / "ag", GOOD_AG, classes="World\nSports\n")
    assert news.labels == ("World", "Sports")
    assert news.test["text"][0] == "T war and peace"  # title and description, as the hub joins them
    assert news.test["label"][:2] == [0, 1]
    kaggles = load(
        tmp_path / "ag", '"Class Index","Title","Description"\n' + GOOD_AG, classes="World\nSports\n"
    )
    assert kaggles.digest() == news.digest()


def test_a_quoted_line_break_and_an_empty_title_are_fine(tmp_path):
    news = load(tmp_path, GOOD_AG + '"1","","two\nlines"\n', classes="World\nSports\n")
    assert news.test["text"][-1] == "two\nlines"


@pytest.mark.parametrize(
    ("train", "classes", "message"),
    [
        (GOOD_AG + '"1","only two"\n', "a\nb\n", "train.csv:5: 2 columns"),
        (GOOD_AG + '"3","T","text"\n', "a\nb\n", "train.csv:5: class '3' is not one of 1..2"),
        (GOOD_AG + '"0","T","text"\n', "a\nb\n", "train.csv:5: class '0'"),
        ('"1","T","two\nlines"\n"x","T","text"\n', "a\nb\n", "train.csv:3: class 'x'"),
        (GOOD_AG + '"1"," ",""\n', "a\nb\n", "train.csv:5: the text is empty"),
        (GOOD + ",sport\n", None, "train.csv:6: the text is empty"),
        (GOOD + "text,\n", None, "train.csv:6: the label is empty"),
        (GOOD + "one,two,three\n", None, "train.csv:6: 3 columns"),
        (GOOD.encode() + b"caf\xe9,sport\n", None, "train.csv:6: byte 0xe9 is not UTF-8"),
        (GOOD + '"open,sport\n', None, "train.csv:6: not CSV"),
        (GOOD, "sport\nmoney\nsport\n", "classes.txt: it lists a class twice"),
        (GOOD, "sport\ntech\n", "train.csv:3: class 'money' is not one of sport, tech"),
        ("text,label\n", None, "train.csv: it has no rows"),
        ("", None, "train.csv: it has no rows"),
        ("text,label,id\na,x,1\n", None, "train.csv:1: the header is text,label,id instead of text,label"),
        ("text,label\na,x\nb,x\nc,x\n", None, "a single class, 'x'"),
        (GOOD, "money\nsport\ntech\n", "4 training rows for 3 classes"),
        (GOOD + "x,money\ny,sport\n", "money\nsport\ntech\n", "class 'tech' has 0 training rows"),
    ],
)
def test_bad_rows_are_errors_that_name_file_and_line(tmp_path, train, classes, message):
    with pytest.raises(DataError) as error:
        load(tmp_path, train, classes=classes)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD)
    with pytest.raises(DataError, match=r"test.csv: there is no such file"):
        load_news(str(tmp_path), 0.5, 0)


def test_a_class_that_only_the_test_split_has_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"test.csv:2: class 'tech'"):
        load(tmp_path, GOOD, test="text,label\na chip,tech\n")


@pytest.mark.parametrize("name", ["ag_news", "someone/news"])
def test_without_a_hub_the_error_says_what_works(name):
    with pytest.raises(DataError, match="--data FOLDER") as error:
        load_news(name, 0.1, 0)
    assert "--data bbc" in str(error.value)


def test_validation_rows_are_cut_from_the_training_rows_stratified(csv_folder):
    news = load_news(str(csv_folder), validation_fraction=0.25, seed=1)
    assert (len(news.train), len(news.validation)) == (27, 9)
    assert Counter(news.validation["label"]) == {0: 3, 1: 3, 2: 3}
    rows = Counter([*news.train["text"], *news.validation["text"]])
    assert rows == Counter(load_news(str(csv_folder), 0.5, seed=7).train["text"]) + Counter(
        load_news(str(csv_folder), 0.5, seed=7).validation["text"]
    )
    again = load_news(str(csv_folder), validation_fraction=0.25, seed=1)
    other = load_news(str(csv_folder), validation_fraction=0.25, seed=2)
    assert news.digest() == again.digest() != other.digest()


def test_fewer_training_rows_leave_validation_and_test_alone(csv_folder):
    news, few = (load_news(str(csv_folder), 0.25, 0, max_train_examples=limit) for limit in (0, 5))
    assert len(few.train) == 5
    assert set(few.train["text"]) <= set(news.train["text"])
    assert few.validation["text"] == news.validation["text"]


def test_bbc_is_split_as_the_readme_says():
    news = load_news("bbc", validation_fraction=0.5, seed=9)  # neither of which matters
    sizes = [len(split) for split in (news.train, news.validation, news.test)]
    assert sizes == [1434, 205, 406]
    assert news.labels == ("business", "entertainment", "politics", "sports", "tech")
    texts = [text for split in (news.train, news.validation, news.test) for text in split["text"]]
    assert len(set(texts)) == sum(sizes)  # nothing stands in two splits
    assert news.digest() == load_news("bbc", 0.1, 0).digest()


def test_some_classes_of_bbc_are_split_as_all_are():
    whole, some = load_news("bbc", 0.1, 0), load_news("bbc:tech,business,politics", 0.5, 9)
    assert some.labels == ("business", "politics", "tech")  # in the order of the corpus
    for part in ("train", "validation", "test"):
        all_rows, rows = getattr(whole, part), getattr(some, part)
        named = [(row["text"], whole.labels[row["label"]]) for row in all_rows]
        expected = [(text, label) for text, label in named if label in some.labels]
        assert [(row["text"], some.labels[row["label"]]) for row in rows] == expected
    assert some.digest() == load_news("bbc:business,tech,politics", 0.1, 0).digest() != whole.digest()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "bbc:: class '' is not one of business, entertainment, politics, sports, tech"),
        ("tech,sport", "bbc:tech,sport: class 'sport' is not one of business, entertainment, politics"),
        ("tech,sports,tech", "bbc:tech,sports,tech: class 'tech' is given twice"),
        ("tech", "bbc:tech: it has a single class, 'tech'; a classifier needs two or more"),
    ],
)
def test_classes_of_bbc_that_cannot_be_used_are_errors(classes, message):
    with pytest.raises(DataError, match=message):
        load_news(f"bbc:{classes}", 0.1, 0)


def test_the_committed_list_is_what_the_script_finds():
    articles = read_articles()
    assert len(articles) == 2225
    assert list(find_duplicates(articles)) == DUPLICATES.read_text().splitlines()


def test_ag_news_real_rows(ag_news_folder):
    news = load_news(str(ag_news_folder), 0.05, 0)
    assert len(news.train) + len(news.validation) == 18_055
    assert Counter(news.test["label"]) == {0: 1900, 1: 1900, 2: 1900, 3: 1900}
    assert news.labels == ("World", "Sports", "Business", "Sci/Tech")


def test_a_class_that_only_validation_has_is_an_error(tmp_path):
    train = "text,label\n" + "".join(f"b{n},b\n" for n in range(98)) + "a1,a\na2,a\n"
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "test.csv").write_text(train)
    with pytest.raises(DataError, match="validation_fraction 0.95 leaves 'a' no training row"):
        load_news(str(tmp_path), validation_fraction=0.95, seed=0)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"text": ["a", "b"], "label": ["x", None]}, {}, "some/news, train row 1: the label None is not one"),
        ({"text": ["a", "b"], "label": [[0], [0, 1]]}, {}, r"train row 0: the label \[0\] is not one class"),
        ({"text": ["a"], "label": ["x"]}, {"text": [], "label": []}, "the split 'test' has no rows"),
    ],
)
def test_a_dataset_on_the_hub_that_is_no_classification_is_an_error(monkeypatch, train, test, message):
    splits = {"train": Dataset.from_dict(train), "test": Dataset.from_dict(test or train)}
    monkeypatch.setattr("train.data._fetch", lambda _: splits)
    with pytest.raises(DataError, match=message):
        load_news("some/news", validation_fraction=0.5, seed=0)


def test_numbers_of_any_kind_are_classes_of_a_dataset_on_the_hub(monkeypatch):
    rows = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0.0, 1.0, 0.0, 1.0]})
    monkeypatch.setattr("train.data._fetch", lambda _: {"train": rows, "test": rows})
    assert load_news("some/news", validation_fraction=0.5, seed=0).labels == ("0.0", "1.0")
