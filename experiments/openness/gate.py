"""The gate: which clients of a federation refuse its base, and what a run writes about that."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_partition.store.store import Store
from engine.messages.errors import RunError
from engine.messages.events import Fault
from experiments.config.recipe import SHIPPED, Recipe
from experiments.openness.card import Card, read_card
from experiments.openness.licences import licences
from experiments.openness.policy import read_policies, refusal

FILE = "openness.json"
KIND = "policy"  # of the faults that name who refuses


@dataclass(frozen=True)
class Verdict:
    """Who refuses the recipe's base, each with its first reason, and their rows; how many refuse each other base."""

    base: str
    card: Card | None
    refused: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    clients: int = 0
    others: dict[str, int] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Who refuses, and why."""
        return tuple(Fault(KIND, name, why) for name, why in self.refused.items())

    def notes(self) -> tuple[str, ...]:
        """What the user should know before the first round."""
        if not self.refused:
            return ()
        first, count = Counter(self.refused.values()).most_common(1)[0]
        most = f"most often ({count}) because {first}" if len(set(self.refused.values())) > 1 else f"because {first}"
        tried = "".join(
            f"; {base} would be refused by {refusing:,} of {self.clients:,}" for base, refusing in self.others.items()
        )
        return (
            f"{len(self.refused):,} of {self.clients:,} clients with {self.rows:,} rows refuse the base by their "
            f"policies and take no part, {most}{tried}",
        )

    def facts(self) -> dict[str, Any]:
        """What openness.json holds."""
        card = self.card
        facts: dict[str, Any] = {"base": self.base, "card": card is not None}
        if card is not None:
            licence = licences().get(card.licence or "")
            facts |= {
                "licence": card.licence,
                "clauses": dict(licence.clauses()) if licence else {},
                "mof_class": card.mof,
                "missing": card.missing(),
                "osaid": card.osaid(),
                "corpus": card.corpus,
                "parameters": card.parameters,
            }
        return facts | {
            "clients": self.clients,
            "refused_clients": len(self.refused),
            "refused_rows": self.rows,
            "refused": self.refused,
            "refused_other_bases": self.others,
        }


def card_of(base: str) -> Card | None:
    """The card of a base: the shipped one's, or a folder's; None without one, as for a name on the hub."""
    return read_card(SHIPPED.get(base, Path(base).expanduser()))


def judged(recipe: Recipe, store: Store) -> Verdict:
    """Tries the base on every client's policy; RunError for a policy of a client that there is not."""
    model, gate = recipe.model, recipe.gate
    card = card_of(model.base)
    if gate.policy is None:
        return Verdict(model.public_base, card, clients=store.num_clients)
    policies = read_policies(Path(gate.policy).expanduser())
    names, rows = store.names(list(range(store.num_clients))), store.counts("train") + store.counts("heldout")
    if unknown := sorted(policies.by_client.keys() - {*names}):
        raise RunError(f"the policy {gate.policy} (gate.policy) is for a client {unknown[0]!r}, which the data lack")

    def refusing(base: str, its_card: Card | None) -> dict[str, str]:
        reasons = ((name, refusal(policies.of(name), base, its_card, model.access)) for name in names)
        return {name: why for name, why in reasons if why is not None}

    refused = refusing(model.public_base, card)
    lost = sum(int(rows[number]) for number, name in enumerate(names) if name in refused)
    others = {base: len(refusing(base, card_of(base))) for base in gate.bases}
    verdict = Verdict(model.public_base, card, refused, lost, len(names), others)
    if len(refused) == len(names):
        why = Counter(refused.values()).most_common(1)[0][0]
        raise RunError(f"all {len(names):,} clients refuse the base by their policies ({why}): take another base")
    return verdict


def notice(card: Card | None) -> str | None:
    """What the licence of the base asks for beside the model, as a NOTICE file; None if there is nothing to say."""
    licence = None if card is None else licences().get(card.licence or "")
    if card is None or licence is None:
        return None
    lines = [f"This is derived from {card.name}, whose weights are licensed under {licence.id}."]
    lines += [f"To pass it on: {licence.redistribution}."]
    if licence.naming:
        lines += [f"Names: {licence.naming}."]
    return "\n".join([*lines, "No legal advice: read the licence itself.", ""])
