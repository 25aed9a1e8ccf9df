import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from datasets_partition.core.types import TURNS, DataError
from datasets_partition.sources.files import ParquetFiles
from datasets_partition.sources.hf_datasets import HfDatasets

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "n": i} for i in range(5)]
SAVED = Dataset.from_list(ROWS)


def test_a_saved_dataset_is_read_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several files, and rows that were moved by an index.
    SAVED.select([4, 0, 2, 1]).save_to_disk(tmp_path / "saved", num_shards=2)
    expected = datasets.load_from_disk(str(tmp_path / "saved")).to_list()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert HfDatasets(name=str(tmp_path / "saved")).load().table.to_pylist() == expected
    assert HfDatasets(name=f"file://{tmp_path}/saved").load().table.to_pylist() == expected


def test_turns_and_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "topic": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    rows = [{"messages": [{"role": "user", "content": "x"}], "topic": topic} for topic in (1, None, 0, -1)]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    table = HfDatasets(name=str(tmp_path / "saved")).load().table
    assert table["messages"].to_pylist() == [row["messages"] for row in rows]
    assert table["topic"].to_pylist() == ["b", None, "a", None]
    assert table.schema.field("messages").type == TURNS
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    assert ParquetFiles(path=str(tmp_path / "rows.parquet")).load().table.equals(table)


def test_the_split_of_a_saved_dict(tmp_path: Path) -> None:
    both = DatasetDict(train=SAVED, test=SAVED.select([0]))
    both.save_to_disk(tmp_path / "both")
    assert HfDatasets(name=str(tmp_path / "both"), split="test").load().table.num_rows == 1
    for split, said in ((None, "not given"), ("dev", "dev")):
        message = rf"^data\.source\.split is {said}, but .*both has the splits train, test: name one of them"
        with pytest.raises(DataError, match=message):
            HfDatasets(name=str(tmp_path / "both"), split=split).load()
    DatasetDict(train=SAVED).save_to_disk(tmp_path / "one")
    assert HfDatasets(name=str(tmp_path / "one")).load().table.num_rows == 5
    SAVED.save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"none', a dataset without splits: leave out data\.source\.split"):
        HfDatasets(name=str(tmp_path / "none"), split="train").load()


def test_a_folder_that_is_no_saved_dataset_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^data\.source\.name is '.*', a folder without a file that ends in state\.json"
    ):
        HfDatasets(name=str(tmp_path)).load()
    SAVED.save_to_disk(tmp_path / "saved")
    source = HfDatasets(name=str(tmp_path / "saved"))
    (data,) = (tmp_path / "saved").glob("*.arrow")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"\.arrow is not a whole Arrow file \(.*\): save it again"):
        source.load()
    data.unlink()
    with pytest.raises(
        DataError, match=r"did not write, or not whole: 'data-.*\.arrow' is missing; .* kind = \"parquet\""
    ):
        source.load()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json is not JSON: save the dataset again"):
        source.load()
    with pytest.raises(DataError, match="which has no config or revision: leave them out"):
        HfDatasets(name=str(tmp_path / "saved"), revision="main").load()


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> DatasetDict:
        asked.append((*names, options))
        return DatasetDict(train=SAVED.select([3, 1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HfDatasets(
        name="some/name", config="en", revision="abc", columns={"prompt": "completion", "completion": "prompt"}
    )
    assert source.load().table.to_pylist() == [{"prompt": f"c{i}", "completion": f"p{i}", "n": i} for i in (3, 1)]
    assert asked == [("some/name", "en", {"split": None, "revision": "abc"})]
    assert source.fingerprint() == SAVED.select([3, 1])._fingerprint


def test_no_network_is_one_sentence() -> None:
    assert datasets.config.HF_HUB_OFFLINE
    for method in (HfDatasets(name="some/name").load, HfDatasets(name="some/name").fingerprint):
        message = (
            r"^data\.source\.name is 'some/name', which is no folder here and does not come from the hub .*: correct"
        )
        with pytest.raises(DataError, match=message):
            method()
    assert logging.getLogger("huggingface_hub").level == logging.ERROR  # warnings tell of retries


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'not installed: pip install "fedpost\[datasets\]"'):
        HfDatasets(name="some/name").load()


def test_the_files_that_are_read_are_those_that_the_library_names(tmp_path: Path) -> None:
    SAVED.save_to_disk(tmp_path / "saved", num_shards=3)
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "other.arrow").write_bytes(b"not a part of it")
    assert len(state["_data_files"]) == 3
    assert HfDatasets(name=str(tmp_path / "saved")).load().table.num_rows == 5
