"""Cards of bases: `card.yml` in the schema of the Model Openness Tool, and the classes of its framework.

The Model Openness Framework (White et al. 2024, arXiv 2403.13784) names 17 components, each with its own licence, and
three classes by which of them are released under open licences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.messages.errors import RunError
from experiments.openness.licences import licences

CARD = "card.yml"
ARCHITECTURE, PARAMETERS, RESULTS = "Model architecture", "Model parameters (Final)", "Evaluation results"
MODEL_CARD, DATA_CARD, REPORT, PAPER = "Model card", "Data card", "Technical report", "Research paper"
TRAINING, INFERENCE, EVALUATION = "Training code", "Inference code", "Evaluation code"
EVALUATION_DATA, DATASETS, PREPROCESSING = "Evaluation data", "Datasets", "Data preprocessing code"
CHECKPOINTS = "Model parameters (Intermediate)"
OTHERS = ("Supporting libraries and tools", "Sample model outputs", "Model metadata")
THIRD = (ARCHITECTURE, PARAMETERS, RESULTS, MODEL_CARD, DATA_CARD, REPORT)
SECOND = (*THIRD, TRAINING, INFERENCE, EVALUATION, EVALUATION_DATA)
FIRST = (*SECOND, DATASETS, PREPROCESSING, CHECKPOINTS, PAPER)
COMPONENTS = (*FIRST, *OTHERS)
CLASSES: Mapping[str, tuple[str, ...]] = {"I": FIRST, "II": SECOND, "III": THIRD}
Corpus = Literal["open", "disclosed", "none"]
CORPORA: tuple[Corpus, ...] = ("open", "disclosed", "none")  # the most open first
Answer = Literal["met", "not", "unknown"]


@dataclass(frozen=True)
class Card:
    """What a base's makers have released: each component's licence id, parameters, and what is known of the corpus.

    `excluded` are jurisdictions in which the base may not be used.
    """

    name: str
    components: Mapping[str, str]
    parameters: int | None = None
    corpus: Corpus = "none"
    excluded: tuple[str, ...] = ()

    @property
    def licence(self) -> str | None:
        """The licence id of the weights."""
        return self.components.get(PARAMETERS)

    @property
    def open_components(self) -> set[str]:
        """What is released under a licence for any use."""
        named = {name for name, licence in self.components.items() if _all_open(licence)}
        return named | ({REPORT} if PAPER in named else set())  # a paper will do as a report

    @property
    def mof(self) -> str | None:
        """The class of the Model Openness Framework, "I" the most open; None: it has none."""
        return next((name for name, parts in CLASSES.items() if self.open_components >= {*parts}), None)

    def missing(self) -> tuple[str, list[str]] | None:
        """The next better class, and what it asks for that is not there; None in the best one."""
        better = [name for name in CLASSES if self.mof is None or name < self.mof]
        if not better:
            return None
        return better[-1], [part for part in CLASSES[better[-1]] if part not in self.open_components]

    def osaid(self) -> dict[str, Answer]:
        """The questions of the Open Source AI Definition 1.0; a licence alone can deny a freedom, and grants none."""
        is_open, licence = self.open_components, licences().get(self.licence or "")
        has: dict[str, Answer] = {
            "data information": "met" if DATA_CARD in is_open and self.corpus != "none" else "unknown",
            "code": "met" if {TRAINING, INFERENCE, PREPROCESSING} <= is_open else "unknown",
            "parameters": "met" if PARAMETERS in is_open else "unknown" if licence is None else "not",
        }
        denied = licence is not None and not licence.is_open
        free: Answer = "not" if denied else "met" if {*has.values()} == {"met"} else "unknown"
        return {**dict.fromkeys(("use", "study", "modify", "share"), free), **has}


def _all_open(expression: str) -> bool:
    """Whether a licence, or each of several joined by AND as SPDX writes them, is known and for any use."""
    known = licences()
    return all(part in known and known[part].is_open for part in expression.split(" AND "))


def read_card(folder: Path) -> Card | None:
    """Reads a base's card; None without one, RunError if it is none."""
    import yaml

    file = folder / CARD
    if not file.is_file():
        return None
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        release = tree["release"]
        components = {part["name"]: part.get("license") for part in release["components"]}
        card = Card(
            str(release["name"]),
            {name: licence for name, licence in components.items() if licence},
            release.get("parameters"),
            release.get("corpus", "none"),
            tuple(release.get("jurisdictions_excluded") or ()),
        )
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        what = f"{file} is no card of a model ({type(error).__name__}: {' '.join(str(error).split())})"
        raise RunError(f"{what}: write it as `fedpost openness BASE --write card.yml` does") from error
    known = {name.lower(): name for name in COMPONENTS}
    if unknown := [name for name in components if name.lower() not in known]:
        raise RunError(f"{file} names {unknown[0]!r}, which is none of the 17 components: {', '.join(COMPONENTS)}")
    if card.corpus not in CORPORA:
        raise RunError(f"{file}: corpus is {card.corpus!r}; it is one of {', '.join(CORPORA)}")
    if card.parameters is not None and not isinstance(card.parameters, int):
        raise RunError(f"{file}: parameters is {card.parameters!r}, and should be a whole number")
    return Card(
        card.name,
        {known[name.lower()]: licence for name, licence in card.components.items()},
        card.parameters,
        card.corpus,
        card.excluded,
    )


def blank_card(name: str) -> str:
    """A card to fill in: all components, without licences."""
    import yaml

    components: list[dict[str, Any]] = [{"name": part, "license": None, "location": None} for part in COMPONENTS]
    framework = {"name": "Model Openness Framework", "version": "1.0"}
    release: dict[str, Any] = {"name": name, "parameters": None, "corpus": "none", "jurisdictions_excluded": []}
    text: str = yaml.safe_dump(
        {"framework": framework, "release": release | {"components": components}}, sort_keys=False
    )
    return text
