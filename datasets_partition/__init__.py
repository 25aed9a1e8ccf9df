"""Rows to clients: sources of rows, rules that give rows to clients, and the client store that every slot reads."""

from datasets_partition.partitioners.combined import Partitioners as Partitioners
from datasets_partition.sources.files import CsvFiles, Jsonl, ParquetFiles, TextFiles
from datasets_partition.sources.hf_datasets import HfDatasets
from datasets_partition.sources.python_docs import PythonDocs

Sources = PythonDocs | Jsonl | ParquetFiles | CsvFiles | TextFiles | HfDatasets
