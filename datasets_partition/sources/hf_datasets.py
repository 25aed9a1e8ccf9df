"""The source for Hugging Face datasets: by name from the hub, or from a folder that `save_to_disk` wrote."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from datasets_partition.core.types import DataError, OnRows, Rows, ignore
from datasets_partition.formats.conversion import ROWS_PER_BATCH, Conversion
from datasets_partition.formats.forms import OnBadRow
from datasets_partition.sources.location import SourceFile, fingerprint, first_line, is_local, source_files

KEY = "data.source.name"


@dataclass(frozen=True, kw_only=True)
class HfDatasets:
    """One split of a dataset: `name` is a name on the hub, or where `save_to_disk` wrote it.

    `split` may be left out where there is only one; a commit as `revision` keeps the hub's rows from changing. Code
    that comes with a dataset is never run. `columns` gives a column's name in the dataset: {prompt = "question"}.
    """

    kind: Literal["datasets"] = "datasets"
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"
    leave_out: tuple[str, ...] = field(default=(), repr=False)  # as that of Files

    def fingerprint(self) -> str:
        """A hash of the files' content, or the fingerprint of the hub's data, with the keys that are left out."""
        rows = fingerprint(self._files()) if self._is_folder() else str(self._from_hub()._fingerprint)
        return " without ".join([rows, *self.leave_out])

    def load(self, on_rows: OnRows = ignore) -> Rows:
        """All rows in order. Raises DataError, with the row's number, for a bad row."""
        conversion = Conversion(self.columns, self.on_bad_row, on_rows, self.leave_out)
        if self._is_folder():
            for file in self._files():
                conversion.add_batches(_batches(file), file.name)
        else:
            tables = self._from_hub().with_format("arrow").iter(ROWS_PER_BATCH)
            conversion.add_batches((batch for table in tables for batch in table.to_batches()), self.name)
        return conversion.rows(self.name)

    def _is_folder(self) -> bool:
        return not is_local(self.name) or Path(self.name).expanduser().is_dir()

    def _files(self) -> list[SourceFile]:
        """The Arrow files of the split, in order."""
        if self.config is not None or self.revision is not None:
            raise DataError(f"{KEY} is {self.name!r}, a folder, which has no config or revision: leave them out")
        suffixes, folder = ("state.json", "dataset_dict.json", ".arrow"), ""
        files = {file.relative: file for file in source_files(self.name, suffixes, KEY)}
        if "dataset_dict.json" in files:
            folder = self._chosen(_read_json(files["dataset_dict.json"])["splits"]) + "/"
        elif self.split is not None:
            raise DataError(f"{KEY} is {self.name!r}, a dataset without splits: leave out data.source.split")
        try:
            state = _read_json(files[f"{folder}state.json"])
            return [files[folder + file["filename"]] for file in state["_data_files"]]
        except KeyError as error:
            raise DataError(
                f"{KEY} is {self.name!r}, a folder that save_to_disk did not write, or not whole: {error} is missing; "
                f'for a folder of other files there are kind = "parquet", "jsonl" and "csv"'
            ) from None

    def _from_hub(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(
                'data.source.kind = "datasets" with a name on the hub needs the library datasets, which is not '
                'installed: pip install "fedpost[datasets]"'
            ) from None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no lines about retries
        try:
            dataset = datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision)
        except Exception as error:  # whatever the library, its HTTP client and its parsers raise
            raise DataError(
                f"{KEY} is {self.name!r}, which is no folder here and does not come from the hub "
                f"({type(error).__name__}: {first_line(error)}): correct the name, connect to the network, or give a "
                f"folder that save_to_disk wrote (there is none at {Path(self.name).expanduser().absolute()})"
            ) from None
        return dataset[self._chosen(list(dataset))] if isinstance(dataset, dict) else dataset

    def _chosen(self, splits: list[str]) -> str:
        split = splits[0] if self.split is None and len(splits) == 1 else self.split
        if split not in splits:
            raise DataError(
                f"data.source.split is {self.split or 'not given'}, but {self.name} has the splits "
                f"{', '.join(splits)}: name one of them"
            )
        return split


def _read_json(file: SourceFile) -> Any:
    with file.opened() as stream:
        content = stream.read()
    try:
        return json.loads(content)
    except ValueError:
        raise DataError(f"{file.name} is not JSON: save the dataset again") from None


def _batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    with file.opened() as stream, file.whole("Arrow", "save it", pa.ArrowException, OSError):
        for batch in pa.ipc.open_stream(stream):
            for first in range(0, len(batch), ROWS_PER_BATCH):
                yield batch.slice(first, ROWS_PER_BATCH)
