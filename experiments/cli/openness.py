"""`fedpost openness BASE`: how open a base is, what its licence asks for, and who would refuse it."""

from pathlib import Path

from rich.table import Table

from engine.config.access import Access
from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.openness.card import blank_card
from experiments.openness.gate import card_of
from experiments.openness.licences import licences
from experiments.openness.policy import read_policies, refusal
from experiments.report.terminal import console, plain


def show_openness(base: str, policy: Path | None, write: Path | None) -> None:
    """Prints what is known of a base; RunError where a file cannot be read or is in the way."""
    screen, card = console(soft_wrap=False), card_of(base)
    if write is not None:
        if write.exists():
            raise RunError(f"{write} is there already: name another file")
        write_file(write, blank_card(base).encode())
        screen.print(
            plain(f"{write}: fill in a licence id for each component that is released, put it beside the base")
        )
        return
    if card is None:
        screen.print(
            plain(f"{base} has no card.yml: write one with --write card.yml, and put it into the base's folder")
        )
    else:
        screen.print(plain(f"{card.name}: class {card.mof or 'none'} of the Model Openness Framework", "bold"))
        if (missing := card.missing()) is not None:
            better, parts = missing
            screen.print(plain(f"for class {better} it lacks {', '.join(parts)}"))
        table = Table("Open Source AI Definition", "")
        for question, answer in card.osaid().items():
            table.add_row(plain(question), plain(answer))
        screen.print(table)
        licence = licences().get(card.licence or "")
        if licence is None:
            screen.print(plain(f"its licence, {card.licence}, is not in experiments/openness/licences.toml"))
        else:
            table = Table(licence.id, "")
            for clause, says in licence.clauses():
                table.add_row(plain(clause), plain(says))
            screen.print(table)
        parameters = "unknown" if card.parameters is None else f"{card.parameters:,}"
        screen.print(plain(f"parameters: {parameters}; training data: {card.corpus}; no legal advice"))
    if policy is not None:
        policies = read_policies(policy)
        listed = {"all others" if policies.by_client else "all": policies.general, **policies.by_client}
        table = Table("client", f"{base} at home")
        for name, its in listed.items():
            table.add_row(plain(name), plain(refusal(its, base, card, Access()) or "takes part"))
        screen.print(table)
