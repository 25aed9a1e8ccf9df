"""Pictures of made-up stores: valid PNG files of a sensible size, whatever the clients are called and however many."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from datasets_partition.store.stats import Categories, Sizes, Skew, TokenLengths
from experiments.report.pictures import _short, _short_each, draw_skew, draw_tokens


def skew(rows, categories=None):
    return Skew(len(rows), 0, int(np.sum(rows)), 0, 0, 0, Sizes(np.array(rows)), categories, 0, 0, {}, 0, 0, 0)


def mixed(clients, categories, seed=0):
    """A store of `clients` whose rows are drawn from all `categories`."""
    counts = np.random.default_rng(seed).integers(0, 9, (clients, categories))
    counts[:, 0] += 1
    owner, code = np.nonzero(counts)
    names = [f"label {number}" for number in range(categories)]
    return skew(counts.sum(1), Categories(names, owner, code, counts[owner, code]))


def lengths(rows, clients):
    return TokenLengths(np.array(rows, np.int32), Sizes(np.array(clients)), 0)


def opened(pictures):
    """The pictures as images; each is read whole, fits a screen or two, and is not of one color."""
    images = {}
    for name, content in pictures.items():
        image = Image.open(io.BytesIO(content))
        image.load()
        assert image.format == "PNG"
        assert 500 <= image.width <= 2600 and 250 <= image.height <= 2600, (name, image.size)
        assert len(content) < 400_000
        assert len(image.getcolors(2**24)) > 10
        images[name] = image
    return images


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("clients", "skewed"), [(1, False), (10, False), (200_000, False), (60, True), (61, True), (2001, True)]
)
def test_any_number_of_clients(clients, skewed):
    rows = np.arange(clients) ** 2 + 1 if skewed else np.full(clients, 10)
    assert list(opened(draw_skew(skew(rows), str))) == ["rows_per_client.png"]
    assert list(opened(draw_tokens(lengths([5, 8, 8], rows * 6), 8))) == ["token_lengths.png"]


@pytest.mark.parametrize(("clients", "categories"), [(1, 1), (60, 30), (500, 200)])
def test_any_number_of_categories(clients, categories):
    images = opened(draw_skew(mixed(clients, categories), lambda client: f"client {client}"))
    assert list(images) == ["rows_per_client.png", "categories.png"]


def test_of_many_clients_the_largest_the_smallest_and_some_between_are_named():
    asked = []
    rows = np.arange(1, 1001)
    categories = Categories(["a"], np.arange(1000), np.zeros(1000, np.int64), rows)
    draw_skew(skew(rows, categories), lambda client: asked.append(client) or "x")
    assert len(asked) == 60
    assert asked == sorted(asked, reverse=True) and asked[0] == 999 and asked[-1] == 0
    assert set(np.diff(asked)) <= {-16, -17}


def test_long_labels_leave_room_for_few_clients():
    names = ["natural-language-processing", "computer-vision-and-patterns"]
    categories = Categories(names, np.array([0, 1]), np.array([0, 1]), np.array([3, 4]))
    assert opened(draw_skew(skew(np.array([3, 4]), categories), str))["categories.png"].height > 600


def test_shortened_names_stay_apart():
    assert _short_each(["a", "x" * 40, "x" * 41, "b"]) == ["a", _short("x" * 40), _short("x" * 40) + " #2", "b"]


def test_names_are_drawn_as_they_are_written():
    names = ["$x_1$", "unbalanced $", r"\frac", "two\nlines", "名前", "[b]no[/b]", "n" * 500, "", "\x00", "é"]
    names += ["\ud800", "\u202eevil", "\x1b[2J"]
    counts = np.arange(1, 14)
    categories = Categories(names, np.arange(13), np.arange(13), counts)
    opened(draw_skew(skew(counts, categories), names.__getitem__))


def test_a_client_without_tokens_and_rows_of_one_length():
    opened(draw_tokens(lengths([16] * 7, [112, 0, 0]), 16))
    opened(draw_tokens(lengths([1], [1]), 2048))


def test_the_same_numbers_give_the_same_bytes():
    assert draw_skew(mixed(20, 5), str) == draw_skew(mixed(20, 5), str)
