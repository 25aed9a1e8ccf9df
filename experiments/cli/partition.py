"""The output of `fedpost partition`: its steps, a table of how uneven the store is, and the files of its pictures."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.status import Status
from rich.table import Column, Table

from datasets_partition.core.types import DataError, OnRows
from datasets_partition.sources.location import within
from datasets_partition.store.sealed import put
from datasets_partition.store.stats import Sizes, Skew, TokenLengths
from datasets_partition.store.store import Store
from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.config.recipe import Recipe, located
from experiments.report.terminal import console, plain
from experiments.runs.api import build_store, shared_store

NAME_WIDTH = 19  # of the table's first column, so that its parts are aligned
DIGITS = str.maketrans("", "", "0123456789,")


def show_partition(recipe: Recipe) -> None:
    """Builds and tokenizes the recipe's store as a run would, shows it, and puts pictures into its folder."""
    screen = console(soft_wrap=False)
    with _steps(screen) as show:
        store = Store.open(build_store(recipe, show))
        show("counting rows")
        skew = Skew.of(store)
    screen.print(plain(store.folder, "bold"), soft_wrap=True)
    screen.print(_table(_rows(store, skew, vars(recipe.data.partition).get("clients"))))
    rows, shared = skew.rows.total + skew.server_rows, shared_store(recipe, store.folder)
    with _steps(screen) as show:  # in a table of its own, since tokenizing many rows takes long
        step = "tokenizing rows (once: runs of this recipe reuse them)"
        show(step)
        tokens = _lengths(recipe, store, shared, lambda row: show(f"{step}: {row:,} of {rows:,}"))
    max_length = recipe.train.max_length
    lines = {"tokens": f"not counted: {tokens}"} if isinstance(tokens, str) else _tokens(tokens[1], max_length)
    screen.print(_table(lines))
    with _steps(screen) as show:
        show("drawing pictures")
        from experiments.report.pictures import draw_skew, draw_tokens  # the first import of matplotlib takes long

        pictures = {store.folder / name: content for name, content in draw_skew(skew, store.name).items()}
        if not isinstance(tokens, str) and len(tokens[1].rows):
            pictures |= {tokens[0] / name: content for name, content in draw_tokens(tokens[1], max_length).items()}
        for file, content in pictures.items():
            write_file(file, content)
            if shared:
                below = file.parent.relative_to(store.folder)
                put([file], within(shared, below.name) if below.name else shared, unless=file.name)
    for file in pictures:
        screen.print(plain(f"{'picture':<{NAME_WIDTH}} {file}"), soft_wrap=True)
    if shared:
        screen.print(plain(f"{'also in':<{NAME_WIDTH}} {shared}"), soft_wrap=True)


def _lengths(recipe: Recipe, store: Store, shared: str | None, on_rows: OnRows) -> tuple[Path, TokenLengths] | str:
    """The folder of the token columns and the lengths; or why there are none, such as a base that cannot be loaded."""
    from transformers.utils import logging as transformers_logging

    from datasets_partition.store.tokens import Tokens
    from engine.workers.token_columns import token_columns

    transformers_logging.set_verbosity_error()  # about rows longer than the base's context, which train.max_length cuts
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # about retries
    try:
        tokens = token_columns(store.folder, located(recipe), shared, on_rows)
        return tokens, TokenLengths.of(store, Tokens.open(tokens))
    except (DataError, RunError) as error:
        return str(error)


def _rows(store: Store, skew: Skew, clients: int | None) -> dict[str, str]:
    """The lines about rows; `clients` is how many clients the partition should make, if it says so."""
    largest = np.argsort(-skew.rows.each, kind="stable")[:3].tolist()
    server = f", and {skew.server_rows:,} of the server" if skew.server_rows else ""
    gone = f", and {skew.duplicate_clients:,} clients with them" if skew.duplicate_clients else ""
    label = "none: the partition goes by no label or topic, and data.label names no column"
    if skew.categories is not None:
        label = f"{skew.categories.divergence:.2f} over {len(skew.categories.names):,} categories (0: each client has "
        label += "the overall mixture, 1: nothing in common)"
    lines = {
        "clients": f"{store.num_clients:,} ({skew.training_clients:,} train, {skew.unseen_clients:,} unseen)",
        "rows": f"{skew.rows.total:,} ({skew.train_rows:,} to train on, {skew.heldout_rows:,} held out, "
        f"{skew.unseen_rows:,} of unseen clients){server}",
        "rows of a client": _spread(skew.rows),
        "largest": ", ".join(f"{store.name(client)} ({skew.rows.each[client]:,})" for client in largest),
        "Gini coefficient": f"{skew.rows.gini:.2f} (0: all clients have the same, 1: one client has all)",
        "label divergence": label,
        "duplicates removed": f"{skew.duplicate_rows:,} rows{gone}",
    }
    if skew.prompts is not None:
        lines["split by"] = f"prompt, of which there are {skew.prompts:,}"
    if skew.skipped_rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skew.skipped_rows.items())
        lines["skipped"] = f"{sum(skew.skipped_rows.values()):,} rows of the source ({reasons})"
    why = []
    if skew.unassigned_rows:
        why.append(f"{skew.unassigned_rows:,} that the partition gives to nobody")
    if skew.left_out_clients:
        below = skew.left_out_rows - skew.unassigned_rows
        why.append(f"{below:,} of {skew.left_out_clients:,} clients below data.splits.min_rows")
    if (without := (clients or 0) - store.num_clients - skew.left_out_clients) > 0:
        why.append(f"{without:,} of {clients:,} clients got none")
    lines["left out"] = f"{skew.left_out_rows:,} rows" + f" ({', '.join(why)})" * bool(why)
    return lines


def _tokens(lengths: TokenLengths, max_length: int) -> dict[str, str]:
    dropped = {"dropped": f"{lengths.dropped:,} rows: nothing to learn is left of them within train.max_length"}
    if not len(lengths.rows):
        return {"tokens": "0"} | dropped
    least, median, ninety, most = np.quantile(lengths.rows, [0, 0.5, 0.9, 1])
    cut = np.count_nonzero(lengths.rows == max_length)
    lines = {
        "tokens": f"{lengths.clients.total:,}",
        "tokens of a client": _spread(lengths.clients),
        "tokens of a row": f"least {least:,.0f}, median {median:,.0f}, 90% up to {ninety:,.0f}, most {most:,.0f} "
        f"({cut:,} rows reach train.max_length = {max_length:,})",
    }
    return lines | dropped if lengths.dropped else lines


def _spread(sizes: Sizes) -> str:
    return f"least {sizes.least:,}, median {sizes.median:,.10g}, most {sizes.most:,}"


def _table(lines: dict[str, str]) -> Table:
    table = Table(Column(width=NAME_WIDTH), Column(), box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, value in lines.items():
        table.add_row(plain(name), plain(value))
    return table


@contextmanager
def _steps(screen: Console) -> Iterator[Any]:
    """Yields a function that shows a step: on a terminal in a line that changes, elsewhere in a line for each kind."""
    shown = ""
    with Status("", console=screen) as status:

        def show(step: str) -> None:
            nonlocal shown
            kind = step.partition(":")[0].translate(DIGITS)  # without the progress
            status.update(plain(f"{step} ..."))
            if not screen.is_terminal and kind != shown:
                screen.print(plain(f"{step} ..."), soft_wrap=True)
            shown = kind

        yield show
