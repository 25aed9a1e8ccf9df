"""Tries damaged files, in a process of its own: python fuzzed.py KIND FOLDER FIRST COUNT.

Case N is a function of N alone. Before each it prints N, and after it the outcome: a result, or a user's error of one
sentence. Anything else ends the process, as a crash would, and so does a case that needs more memory than there is.
"""

import json
import os
import random
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from datasets_partition.partitioners.natural import Natural
from datasets_partition.sources.files import ParquetFiles
from datasets_partition.store.build import build
from datasets_partition.store.sealed import refuse_another
from datasets_partition.store.splits import Splits
from datasets_partition.store.stats import Skew
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import Tokens, tokenize

MEMORY = 12 * 2**30  # of addresses, a part of which allocators only reserve
SPLITS = ("train", "heldout")
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01", b"\xff")
Try = Callable[[int], None]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with one fault of the kinds that disks, networks and people with bad intentions make."""
    at = draw.randrange(len(content))
    if draw.random() < 0.4:  # the end is where Parquet and Arrow keep what all else is found by
        at = len(content) - 1 - draw.randrange(min(len(content), 400))
    length = 1 + draw.randrange(64)
    match draw.randrange(7):
        case 0 | 1:
            changed = bytearray(content)
            for _ in range(draw.choice([1, 1, 1, 2, 8])):
                changed[at] ^= 1 + draw.randrange(255)
                at = draw.randrange(len(content))
            return bytes(changed)
        case 2:
            return content[:at]
        case 3:
            return content[:at] + content[at + length :]
        case 4:
            return content[:at] + draw.randbytes(length) + content[at:]
        case 5:
            other = draw.randrange(len(content))
            return content[:at] + content[other : other + length] + content[at + length :]
        case _:
            extreme = draw.choice(EXTREMES)
            return content[:at] + extreme + content[at + len(extreme) :]


def flipped(content: bytes, draw: random.Random) -> bytes:
    """The content with another byte in one place: its size stays."""
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 + draw.randrange(255))]) + content[at + 1 :]


def rows(folder: Path) -> Try:
    """Parquet as a source: all of them rows of a store, or none."""
    kinds = [kind.read_bytes() for kind in _parquet(folder)]

    def attempt(number: int) -> None:
        draw = random.Random(number)
        (folder / "rows.parquet").write_bytes(damaged(draw.choice(kinds), draw))
        stores = folder / "stores"
        try:
            source = ParquetFiles(path=str(folder / "rows.parquet"), on_bad_row=draw.choice(["error", "skip"]))
            store = Store.open(build(source, Natural(), Splits(heldout=0.2, unseen=0.2), 1, str(stores)))
            _read(store)
        finally:
            left = list(stores.iterdir()) if stores.exists() else []
            assert not [path for path in left if path.name.startswith(".")], "half a store is left"
            shutil.rmtree(stores, ignore_errors=True)

    return attempt


def _parquet(folder: Path) -> list[Path]:
    """One file for each way in which rows are often written."""
    clients = [f"c{n % 7}" for n in range(60)]
    texts = pa.array([f"row {n} " * (n % 5) for n in range(60)])
    turns = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(60)]
    plain = pa.table({"client": clients, "prompt": texts, "completion": [f"{n}" for n in range(60)]})
    coded = plain.append_column("topic", pa.array([f"t{n % 4}" for n in range(60)]).dictionary_encode())
    dated = coded.append_column("when", pa.array(range(60), pa.timestamp("ms")))
    talks = pa.table({"client": clients, "messages": turns})
    written = {
        "plain": (plain, {"compression": "none"}),
        "coded": (coded, {"compression": "zstd", "row_group_size": 16}),
        "dated": (dated, {"compression": "gzip", "data_page_version": "2.0"}),
        "talks": (talks, {"compression": "snappy", "write_page_checksum": True}),
        "small": (plain.slice(0, 8), {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
    }
    for name, (table, options) in written.items():
        pq.write_table(table, folder / f"{name}.of_rows", **options)
    return sorted(folder.glob("*.of_rows"))


def report(folder: Path) -> Try:
    """Any file of a run folder that a report reads: a page, or none."""
    from experiments.report.page import write_report

    whole = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}

    def attempt(number: int) -> None:
        draw = random.Random(number)
        path = draw.choice(sorted(whole))
        path.write_bytes(damaged(whole[path], draw))
        page = folder / "page.html"
        try:
            write_report([folder / "run"], page)
        except ValueError:
            assert not page.exists(), "half a page is left"
            raise
        finally:
            page.unlink(missing_ok=True)
            path.write_bytes(whole[path])

    return attempt


def store(folder: Path) -> Try:
    """Any byte of a store and its token columns: they are refused, or can be read to the end."""
    clients = [{"client": f"c{n % 9}", "prompt": f"{n} is", "completion": f"{n + 1}"} for n in range(90)]
    pq.write_table(pa.Table.from_pylist(clients), folder / "rows.parquet")
    made = build(ParquetFiles(path=str(folder / "rows.parquet")), Natural(), Splits(), 1, str(folder / "stores"))
    tokens = tokenize(Store.open(made), "bytes", _encode).folder
    keys = {path: json.loads((path / "manifest.json").read_text())["key"] for path in (made, tokens)}
    whole = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    first = _read(Store.open(made)), _read(Tokens.open(tokens))

    def attempt(number: int) -> None:
        draw = random.Random(number)
        path = draw.choice(sorted(whole))
        path.write_bytes(draw.choice([flipped, damaged])(whole[path], draw))
        try:
            for place, key in keys.items():
                refuse_another(place, key)
            opened = Store.open(made)
            Skew.of(opened)
            again = _read(opened), _read(Tokens.open(tokens))
            # What tokens are has no checksum; all else has.
            assert again[0] == first[0] and (path.name == "tokens.arrow" or again == first), f"{path} is taken as whole"
        finally:
            path.write_bytes(whole[path])

    return attempt


def _encode(table: pa.Table) -> pa.Table:
    ids = pa.array([list(text.encode()) for text in table["completion"].to_pylist()], pa.list_(pa.int32()))
    return pa.table({"input_ids": ids, "mask": ids.cast(pa.list_(pa.int8()))})


def _read(opened: Store | Tokens) -> list[object]:
    """All that is in it."""
    read = opened.read_rows if isinstance(opened, Store) else opened.rows
    tables = [read(client, split).to_pydict() for client in range(opened.index.num_rows) for split in SPLITS]
    return [*tables, opened.index.to_pydict()]


def main(kind: str, folder: str, first: str, count: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    attempt: Try = {"rows": rows, "report": report, "store": store}[kind](Path(folder))
    results = Counter[str]()
    for number in range(int(first), int(first) + int(count)):
        print(number, flush=True)
        try:
            attempt(number)
        except ValueError as error:
            if not hasattr(error, "exit_code") or not str(error).strip():
                raise
            results["refused"] += 1
        else:
            results["read"] += 1
    print(json.dumps(results), flush=True)
    sys.stdout.flush()
    os._exit(0)  # nothing of what was damaged is looked at again


if __name__ == "__main__":
    main(*sys.argv[1:])
