"""Rows to clients: where rows come from, whose they are, and the client store that every slot reads.

The two unions are the registries: a recipe's `data.source` and `data.partition` name one of their members by `kind`.
"""

from datasets_partition.partitioners.by_length import ByLength
from datasets_partition.partitioners.by_size import BySize
from datasets_partition.partitioners.by_time import ByTime
from datasets_partition.partitioners.by_topic import ByTopic
from datasets_partition.partitioners.combined import Combined
from datasets_partition.partitioners.continuous import Continuous
from datasets_partition.partitioners.dirichlet import Dirichlet
from datasets_partition.partitioners.distribution import Distribution
from datasets_partition.partitioners.grouped_natural import GroupedNatural
from datasets_partition.partitioners.iid import Iid
from datasets_partition.partitioners.inner_dirichlet import InnerDirichlet
from datasets_partition.partitioners.natural import Natural
from datasets_partition.partitioners.pathological import Pathological
from datasets_partition.partitioners.shards import Shards
from datasets_partition.partitioners.size_cap import SizeCap
from datasets_partition.sources.csv_files import CsvFiles
from datasets_partition.sources.hf_datasets import HfDatasets
from datasets_partition.sources.jsonl import Jsonl
from datasets_partition.sources.parquet_files import ParquetFiles
from datasets_partition.sources.python_docs import PythonDocs
from datasets_partition.sources.text_files import TextFiles

Sources = PythonDocs | Jsonl | ParquetFiles | CsvFiles | TextFiles | HfDatasets
Partitioners = (
    Natural
    | GroupedNatural
    | ByTime
    | Iid
    | BySize
    | SizeCap
    | Dirichlet
    | InnerDirichlet
    | Shards
    | Pathological
    | Distribution
    | Continuous
    | ByLength
    | ByTopic
    | Combined
)
