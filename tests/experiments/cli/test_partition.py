"""What `fedpost partition` prints and leaves in the store's folder."""

import json

import pytest
from PIL import Image

from datasets_partition.sources import location
from experiments.cli.partition import show_partition
from experiments.config.recipe import parse_recipe, to_toml
from experiments.runs.api import build_store


@pytest.fixture
def shown(capsys, monkeypatch):
    """Shows the partition of a recipe; gives the lines that it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def show(recipe):
        show_partition(recipe)
        out, err = capsys.readouterr()
        assert err == ""
        return [line.rstrip() for line in out.splitlines()]

    return show


@pytest.fixture
def labeled(small_recipe, tmp_path):
    """A recipe whose rows have a category, one of them twice, in a store of its own."""
    rows = [{"prompt": f"{n} is ", "completion": "odd" if n % 2 else "even", "topic": f"t{n % 3}"} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    partition = '{ kind = "dirichlet", label = "topic", clients = 5, alpha = 0.1 }'
    source = json.dumps(str(path))
    text = to_toml(small_recipe(f"data.cache={tmp_path / 'stores'}"))
    return parse_recipe(text, [f'data.source={{ kind = "jsonl", path = {source} }}', f"data.partition={partition}"])


def test_steps_then_a_table_then_the_pictures(shown, labeled):
    lines = shown(labeled)
    store = build_store(labeled)
    table = {line[:19].rstrip(): line[19:].strip() for line in lines}
    assert lines[0] == "reading the rows ..."
    for step in ("reading the rows", "tokenizing rows"):  # a line each, however often they tell how far they are
        assert sum(line.startswith(step) for line in lines) == 1
    assert lines.index("counting rows ...") < lines.index(str(store)) < lines.index("drawing pictures ...")
    assert table["clients"] == "5 (4 train, 1 unseen)"
    assert table["rows"].startswith("60 (")
    assert table["rows of a client"].startswith("least ")
    assert 0 < float(table["Gini coefficient"].split()[0]) < 1
    assert 0 < float(table["label divergence"].split()[0]) < 1 and "over 3 categories" in table["label divergence"]
    assert table["duplicates removed"] == "1 rows" and "split by" not in table
    assert int(table["tokens"].replace(",", "")) > 60
    assert table["tokens of a row"].startswith("least ") and "train.max_length = 48" in table["tokens of a row"]
    (tokens,) = store.glob("tokens-*")
    assert [line.split()[-1] for line in lines[-3:]] == [
        *(str(store / name) for name in ("rows_per_client.png", "categories.png")),
        str(tokens / "token_lengths.png"),
    ]
    for line in lines[-3:]:
        Image.open(line.split()[-1]).verify()
    assert not list(store.glob(".*"))


def test_a_label_that_the_partition_does_not_go_by(shown, labeled):
    dealt = parse_recipe(to_toml(labeled), ['data.partition={ kind = "iid", clients = 5 }'])
    assert "label divergence    none: the partition goes by no label or topic, and data.label names no column" in shown(
        dealt
    )
    lines = shown(parse_recipe(to_toml(dealt), ["data.label=topic"]))
    skewed, even = (
        float(next(line for line in said if line.startswith("label divergence")).split()[2])
        for said in (shown(labeled), lines)
    )
    assert 0 < even < skewed / 2
    assert lines[-2].endswith("categories.png")


def test_a_split_by_prompt_is_said(shown, labeled):
    assert "split by            prompt, of which there are 60" in shown(
        parse_recipe(to_toml(labeled), ["data.splits.by=prompt"])
    )


def test_a_second_look_builds_nothing_and_says_the_same(shown, labeled):
    first, second = shown(labeled), shown(labeled)
    assert second == first[first.index("counting rows ...") :]


def test_a_base_that_cannot_be_had_is_told_beside_the_table(shown, labeled, tmp_path):
    lines = shown(parse_recipe(to_toml(labeled), [f"model.base={tmp_path / 'nowhere'}"]))
    assert any(line.startswith("Gini coefficient") for line in lines)
    assert any(line.startswith("tokens              not counted: model.base") for line in lines)
    assert [line.split("/")[-1] for line in lines[-2:]] == ["rows_per_client.png", "categories.png"]


def test_pictures_go_where_the_store_is_shared(shown, labeled, tmp_path, monkeypatch):
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    shared = tmp_path / "shared"
    lines = shown(parse_recipe(to_toml(labeled), [f"data.cache={shared.as_uri()}"]))
    (store,) = shared.iterdir()
    assert lines[-1].split() == ["also", "in", store.as_uri()]
    names = {path.relative_to(store).parts[-1] for path in store.rglob("*.png")}
    assert names == {"rows_per_client.png", "categories.png", "token_lengths.png"}
    assert next(store.rglob("token_lengths.png")).parent.name.startswith("tokens-")


def test_why_rows_and_clients_are_left_out_is_said(shown, labeled, tmp_path):
    rows = [{"client": f"c{n % 20 // 8}", "prompt": f"{n}", "completion": "x", "topic": "t"} for n in range(20)]
    path = tmp_path / "left.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3] | {"client": "twin"}]))
    least = [f'data.source={{ kind = "jsonl", path = "{path}" }}', "cohort.size=1"]

    def said(partition, *changes):
        lines = shown(parse_recipe(to_toml(labeled), [*least, f"data.partition={partition}", *changes]))
        return {line[:19].rstrip(): line[19:].strip() for line in lines}

    capped = said(
        '{ kind = "combined", first = "natural", then = { kind = "size_cap", rows = 6, surplus = "drop" } }',
        "data.splits.min_rows=5",
    )
    assert capped["duplicates removed"] == "1 rows, and 1 clients with them"
    assert capped["left out"] == (
        "8 rows (4 that the partition gives to nobody, 4 of 1 clients below data.splits.min_rows)"
    )
    skewed = said('{ kind = "dirichlet", label = "topic", clients = 15, alpha = 0.01, min_rows = 0 }')
    assert skewed["left out"].startswith("0 rows (1") and skewed["left out"].endswith(" of 15 clients got none)")


def test_rows_that_are_all_dropped_are_told(shown, labeled):
    lines = shown(parse_recipe(to_toml(labeled), ["train.max_length=2"]))
    assert "tokens              0" in lines
    assert "dropped             60 rows: nothing to learn is left of them within train.max_length" in lines
    assert not any("token_lengths.png" in line for line in lines)


def test_a_client_whose_name_looks_like_markup(shown, labeled, tmp_path):
    path = tmp_path / "named.jsonl"
    lines = [json.dumps({"client": "[red]$a_1$[/]", "prompt": f"{n}", "completion": "x"}) for n in range(9)]
    path.write_text("\n".join(lines))
    source = f'data.source={{ kind = "jsonl", path = "{path}" }}'
    recipe = parse_recipe(to_toml(labeled), [source, 'data.partition={ kind = "natural" }', "cohort.size=1"])
    assert "largest             [red]$a_1$[/] (9)" in shown(recipe)
