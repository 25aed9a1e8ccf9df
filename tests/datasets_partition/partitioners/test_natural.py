import pyarrow as pa

from datasets_partition.partitioners.natural import Natural


def test_clients_are_the_values_of_the_key(rng):
    table = pa.table({"client": ["b", "a", "b", "é", "a", "b"]})
    clients, names, category, order, _ = Natural().assign(table, rng())
    assert names.to_pylist() == ["a", "b", "é"]
    assert clients.tolist() == [1, 0, 1, 2, 0, 1]
    assert category is None and order is None


def test_values_of_other_types_are_named_by_their_text(rng):
    table = pa.table({"size": [30, 4, 30]})
    clients, names, *_ = Natural(key="size").assign(pa.concat_tables([table, table]), rng())
    assert names.to_pylist() == ["30", "4"]
    assert clients.tolist() == [0, 1, 0] * 2
