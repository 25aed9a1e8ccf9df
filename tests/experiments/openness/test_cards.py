"""Cards, classes, licences: what a base is called by what of it is released."""

import pytest

from engine.messages.errors import RunError
from experiments.config.recipe import SHIPPED
from experiments.openness.card import (
    CLASSES,
    COMPONENTS,
    DATA_CARD,
    FIRST,
    PAPER,
    PARAMETERS,
    REPORT,
    THIRD,
    Card,
    blank_card,
    read_card,
)
from experiments.openness.licences import licences

OPEN, LLAMA = "Apache-2.0", "LicenseRef-scancode-llama-3-license-2024"


def card(*parts, licence=OPEN, **more):
    return Card("base", dict.fromkeys(parts, licence), **more)


def test_the_framework_has_seventeen_components_and_classes_that_contain_each_other():
    assert len(COMPONENTS) == len(set(COMPONENTS)) == 17
    assert {*CLASSES["I"]} > {*CLASSES["II"]} > {*CLASSES["III"]}


def test_a_class_asks_for_all_its_parts_under_open_licences():
    assert card(*THIRD).mof == "III" and card(*THIRD[:-1]).mof is None
    assert card(*CLASSES["II"]).mof == "II" and card(*FIRST).mof == "I"
    assert card(*FIRST, licence=LLAMA).mof is None  # its uses are limited
    assert card(*FIRST, licence="Unheard-of").mof is None
    assert card(*FIRST, licence="MIT AND Apache-2.0").mof == "I"
    assert card(*FIRST, licence=f"MIT AND {LLAMA}").mof is None
    paper = [part for part in THIRD if part != REPORT] + [PAPER]
    assert card(*paper).mof == "III"  # a paper will do as a report


def test_what_is_missing_for_the_next_class_is_named():
    assert card(*THIRD[:-1]).missing() == ("III", [REPORT])
    assert card(*FIRST).missing() is None
    better, parts = card(*THIRD).missing()
    assert better == "II" and {*parts} == {*CLASSES["II"]} - {*THIRD}


def test_a_licence_alone_answers_no_question_of_the_definition():
    alone = card(PARAMETERS).osaid()
    assert alone == {
        **dict.fromkeys(("use", "study", "modify", "share"), "unknown"),
        "data information": "unknown",
        "code": "unknown",
        "parameters": "met",
    }
    assert set(card(*FIRST, corpus="disclosed").osaid().values()) == {"met"}
    assert card(PARAMETERS, DATA_CARD, licence=LLAMA).osaid()["use"] == "not"


def test_the_shipped_base_is_of_class_two():
    ours = read_card(SHIPPED["tiny"])
    assert ours.mof == "II" and ours.licence == OPEN and ours.corpus == "open"
    assert ours.missing() == ("I", ["Model parameters (Intermediate)", PAPER])
    folder = SHIPPED["tiny"]
    assert all((folder / name).is_file() for name in ("DATA_CARD.md", "TECHNICAL_REPORT.md", "README.md"))
    # The number of parameters is the file's.
    import json

    config = json.loads((folder / "config.json").read_text())
    width, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    counted = config["vocab_size"] * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width
    assert ours.parameters == counted


def test_known_licences_are_those_of_the_table():
    known = licences()
    assert len(known) == 13
    assert {name for name, licence in known.items() if licence.is_open} == {
        "Apache-2.0",
        "MIT",
        "BSD-3-Clause",
        "OpenMDW-1.0",
    }
    assert known["LicenseRef-scancode-qwen-2024"].users == 100_000_000
    assert dict(known["CC-BY-NC-4.0"].clauses())["field of use"] == "non-commercial"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("release: [", "is no card of a model"),
        ("release: {name: x}", "is no card of a model"),
        ("release: {name: x, components: [{name: Colour, license: MIT}]}", "is none of the 17 components"),
        ("release: {name: x, corpus: some, components: []}", "corpus is 'some'"),
        ("release: {name: x, parameters: many, components: []}", "should be a whole number"),
    ],
)
def test_a_faulty_card_is_refused_with_the_way_out(tmp_path, text, what):
    (tmp_path / "card.yml").write_text(text)
    with pytest.raises(RunError) as refused:
        read_card(tmp_path)
    assert what in str(refused.value)


def test_a_card_to_fill_in_is_a_card(tmp_path):
    (tmp_path / "card.yml").write_text(blank_card("mine"))
    mine = read_card(tmp_path)
    assert mine.name == "mine" and not mine.components and mine.mof is None
