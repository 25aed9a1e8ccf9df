import pytest

from engine.config.sections import Clients, Zero
from engine.messages.errors import RunError
from engine.scheduling.placement import refuse_shared_gpus, slot_counts, slots_that_fit


@pytest.mark.parametrize(
    ("clients", "nodes", "fit"),
    [
        (Clients(), [{"CPU": 2.0}], 2),
        (Clients(num_cpus=0.1), [{"CPU": 1.0}], 10),
        (Clients(num_cpus=1.5), [{"CPU": 4.0}, {"CPU": 2.0}], 3),  # two and one: no slot spans two nodes
        (Clients(num_gpus=0.25), [{"CPU": 16.0, "GPU": 1.0}], 4),
        (Clients(num_gpus=0.25), [{"CPU": 3.0, "GPU": 1.0}], 3),
        (Clients(num_gpus=1.0), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 2),
        (Clients(num_cpus=0.0, num_gpus=0.5), [{"GPU": 1.0}, {"CPU": 8.0}], 2),
    ],
)
def test_by_hand(clients: Clients, nodes: list[dict[str, float]], fit: int) -> None:
    assert slots_that_fit(clients, nodes) == fit


def test_the_error_says_what_was_asked_and_what_there_is() -> None:
    with pytest.raises(ValueError, match="needs 4 CPUs and 0 GPUs on one node, but the largest of 1 has 2 CPUs and 0"):
        slots_that_fit(Clients(num_cpus=4), [{"CPU": 2.0}])
    with pytest.raises(ValueError, match=r"1 CPUs and 0\.5 GPUs on one node.* 8 CPUs and 0 GPUs: lower clients"):
        slots_that_fit(Clients(num_gpus=0.5), [{"CPU": 8.0}])
    with pytest.raises(ValueError, match="no node at all"):
        slots_that_fit(Clients(), [])


def test_the_largest_node_is_the_largest_by_number() -> None:
    with pytest.raises(ValueError, match="the largest of 2 has 16 CPUs"):
        slots_that_fit(Clients(num_cpus=32), [{"CPU": 16.0}, {"CPU": 8.0}])


def test_a_fraction_of_a_gpu_lies_on_one_gpu() -> None:
    node = {"CPU": 64.0, "GPU": 2.0}
    for share, fit in ((0.6, 2), (0.4, 4), (0.25, 8), (1.0, 2), (2.0, 1)):
        assert slots_that_fit(Clients(num_cpus=0.5, num_gpus=share), [node]) == fit


def test_ranks_of_a_gang_have_a_gpu_each() -> None:
    refuse_shared_gpus([("a", "0"), ("a", "1"), ("b", "0"), ("b", None), ("b", None)])
    with pytest.raises(ValueError, match=r"3 ranks of a gang were given 2 GPUs.*set clients\.num_gpus = 1"):
        refuse_shared_gpus([("a", "0"), ("a", "1"), ("a", "0")])


def test_gangs_and_the_slots_beside_them_by_hand() -> None:
    nodes = [{"CPU": 5.0}, {"CPU": 2.0}]

    def counts(**zero: int) -> tuple[int, int]:
        return slot_counts(Clients(zero=Zero(**zero)), nodes)

    assert counts(ranks=3) == (2, 0)
    assert counts(ranks=3, gangs=2, from_rows=1) == (2, 1)
    assert slot_counts(Clients(), nodes) == (0, 7) and slot_counts(Clients(slots=4), nodes) == (0, 4)
    with pytest.raises(RunError, match="needs 8 ranks of 1 CPUs and 0 GPUs each, but all nodes together have 7 CPUs"):
        counts(ranks=8)
    with pytest.raises(RunError, match="need 8 times 1 CPUs and 0 GPUs, and there is room for 7 of them"):
        counts(ranks=7, gangs=1, from_rows=1)
