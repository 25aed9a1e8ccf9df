"""Policies of clients: what a base, its licence and its provider's terms must be, and why one is refused."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from engine.config.access import Access
from engine.messages.errors import RunError
from experiments.openness.card import CLASSES, CORPORA, Card, Corpus
from experiments.openness.licences import Licence, licences
from strategies.core.access import Level

CLASS_ORDER = (*CLASSES, None)  # the most open first


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a client asks for; a key that is unset asks for nothing.

    `mof` is the worst class of the Model Openness Framework, `corpus` the least that is told of the training data,
    `commercial` and `users` what the client wants to do with the model, `train_others` whether its outputs are to train
    other models. `levels` and `max_retain_days` are about the provider.
    """

    licences: tuple[str, ...] | None = None
    mof: Literal["I", "II", "III"] | None = None
    corpus: Corpus | None = None
    commercial: bool = False
    users: int | None = None
    jurisdiction: str | None = None
    max_parameters: int | None = None
    levels: tuple[Level, ...] | None = None
    max_retain_days: int | None = None
    train_others: bool = False


@dataclass(frozen=True)
class Policies:
    """The policy of all clients, and those of some by name."""

    general: Policy
    by_client: dict[str, Policy]

    def of(self, client: str) -> Policy:
        """The policy of a client."""
        return self.by_client.get(client, self.general)


_TABLE: TypeAdapter[Policy] = TypeAdapter(Policy)


def read_policies(file: Path) -> Policies:
    """Reads `[all]` and `[clients.NAME]` tables, of which the second change the first; RunError with the way out."""
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"the policy {file} (gate.policy) cannot be read: {error}") from error
    if others := sorted(tree.keys() - {"all", "clients"}):
        raise RunError(f"the policy {file} has a table {others[0]!r}: it takes [all] and [clients.NAME]")
    general = tree.get("all", {})
    return Policies(
        _policy(general, f"{file}: all"),
        {name: _policy(general | table, f"{file}: clients.{name}") for name, table in tree.get("clients", {}).items()},
    )


def _policy(table: dict[str, object], place: str) -> Policy:
    try:  # through JSON: only there does strict mode take arrays for tuples
        return _TABLE.validate_json(json.dumps(table, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        keys = ", ".join(Policy.__dataclass_fields__)
        raise RunError(f"{place}.{key}: {fault['msg']}; a policy takes {keys}") from error


def refusal(policy: Policy, name: str, card: Card | None, access: Access) -> str | None:
    """Why a client with this policy refuses the base of a name, at these terms; None if it takes part."""
    if (why := _refused_terms(policy, access)) is not None:
        return why
    if policy == replace(Policy(), levels=policy.levels, max_retain_days=policy.max_retain_days):
        return None  # it asks for nothing that a card tells
    if card is None:
        return f"{name} has no card.yml, which would tell its licence and what is open of it"
    licence = licences().get(card.licence or "")
    if licence is None:
        what = f"the licence {card.licence!r} of {name} is not known" if card.licence else f"{name} names no licence"
        return f"{what}: declare one of experiments/openness/licences.toml in its card.yml"
    return _refused_licence(policy, licence) or _refused_card(policy, card)


def _refused_terms(policy: Policy, access: Access) -> str | None:
    if policy.levels is not None and access.level not in policy.levels:
        return f'the level is "{access.level}", and it accepts {_listed(policy.levels)}'
    if policy.max_retain_days is not None and not access.home:
        if access.retain_days is None:
            return f"the provider does not say how long it keeps rows, and it accepts {policy.max_retain_days} days"
        if access.retain_days > policy.max_retain_days:
            return f"the provider keeps rows for {access.retain_days} days, and it accepts {policy.max_retain_days}"
    return None


def _refused_licence(policy: Policy, licence: Licence) -> str | None:
    if policy.licences is not None and licence.id not in policy.licences:
        return f"the licence is {licence.id}, and it accepts {_listed(policy.licences)}"
    if policy.commercial and licence.field_of_use == "non-commercial":
        return f"{licence.id} is for non-commercial use, and it wants commercial use"
    if policy.users is not None and licence.users is not None and policy.users > licence.users:
        return f"{licence.id} ends at {licence.users:,} users, and it has {policy.users:,}"
    if policy.jurisdiction is not None and policy.jurisdiction in licence.excluded:
        return f"{licence.id} gives no licence in {policy.jurisdiction}"
    if policy.train_others and licence.outputs == "not for others":
        return f"{licence.id} lets outputs train no other models, and it wants that"
    return None


def _refused_card(policy: Policy, card: Card) -> str | None:
    if policy.jurisdiction is not None and policy.jurisdiction in card.excluded:
        return f"{card.name} may not be used in {policy.jurisdiction}"
    if policy.mof is not None and CLASS_ORDER.index(card.mof) > CLASS_ORDER.index(policy.mof):
        named = f"of class {card.mof}" if card.mof else "of no class of the Model Openness Framework"
        return f"{card.name} is {named}, and it accepts class {policy.mof} or better"
    if policy.corpus is not None and CORPORA.index(card.corpus) > CORPORA.index(policy.corpus):
        known, asked = _in_words(card.corpus), _in_words(policy.corpus)
        return f"the training data of {card.name} are {known}, and it asks for {asked} data"
    if policy.max_parameters is not None:
        if card.parameters is None:
            return f"{card.name} does not say how many parameters it has, and it accepts {policy.max_parameters:,}"
        if card.parameters > policy.max_parameters:
            return f"{card.name} has {card.parameters:,} parameters, and it accepts {policy.max_parameters:,}"
    return None


def _in_words(corpus: Corpus) -> str:
    return {"open": "open", "disclosed": "disclosed", "none": "undisclosed"}[corpus]


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values) or "none"
