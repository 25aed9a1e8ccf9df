import pytest
import torch

from strategies.core.layout import Layout
from strategies.core.protocol import GLOBAL, Aggregate, Broadcast, Update
from strategies.personalized.personal_models import PERSONAL, FedDpa

# Rank 2: the global adapter is A's first row and B's first column, the local one the second.
LAYOUT = Layout(("q.lora_A.default.weight", "q.lora_B.default.weight"), ((2, 1), (2, 2)), scale=2.0)
#                       A     B
PARAMS = torch.tensor([3.0, 7, 4, 0, 6, 0])


def test_two_rounds_of_two_clients() -> None:
    strategy = FedDpa(mix=0.25)
    state = strategy.init(PARAMS, LAYOUT)
    broadcast = strategy.broadcast(state)
    starts = strategy.starts(broadcast, {})
    assert list(starts) == [GLOBAL, PERSONAL]
    assert starts[GLOBAL].tolist() == [3, 7, 4, 0, 6, 0]
    assert starts[PERSONAL].tolist() == [3, 7, 3, 0, 4.5, 0]  # B's first column by 1 - mix
    assert strategy.personal(broadcast, {}) is None
    ends = {PERSONAL: torch.tensor([3.0, 8, 3, 1, 4.5, 2])}
    update, client_state = strategy.finish(Update(0, 1.0, torch.tensor([1.0, 0, 2, 0, 4, 0])), broadcast, {}, ends)
    other, _ = strategy.finish(Update(1, 3.0, torch.tensor([1.0, 0, -2, 0, 0, 0])), broadcast, {}, ends)
    assert client_state["local"].tolist() == [8, 1, 2]
    # A: (1 + 3) / 4 = 1;  B: (2 - 6) / 4 = -1, (4 + 0) / 4 = 1; of the local adapter nothing
    state = strategy.apply(state, Aggregate(4.0, update.delta + 3 * other.delta, {}, 2))
    assert state.params.tolist() == [4, 7, 3, 0, 7, 0]

    broadcast = strategy.broadcast(state)
    expected = [4, 8, 2.25, 1, 5.25, 2]
    assert strategy.starts(broadcast, client_state)[PERSONAL].tolist() == expected
    personal = strategy.personal(broadcast, client_state)
    assert personal is not None and personal.tolist() == expected
    assert state.params.tolist() == [4, 7, 3, 0, 7, 0]


def test_each_training_moves_its_own_adapter() -> None:
    strategy, broadcast = FedDpa(), Broadcast(0, PARAMS, layout=LAYOUT)
    grad = torch.ones(1, 6)
    strategy.correct(grad, PARAMS[None], broadcast, {})
    assert grad.tolist() == [[1, 0, 1, 0, 1, 0]]
    grad = torch.ones(1, 6)
    strategy.correct(grad, PARAMS[None], broadcast, {}, PERSONAL)
    assert grad.tolist() == [[0, 1, 0, 1, 0, 1]]
    assert strategy.floats(broadcast) == (3, 3)


def test_without_a_mix_the_local_adapter_comes_on_top_of_the_whole_global_one() -> None:
    broadcast = Broadcast(0, PARAMS, layout=LAYOUT)
    assert FedDpa(mix=0.0).starts(broadcast, {})[PERSONAL].tolist() == PARAMS.tolist()
    assert FedDpa(mix=1.0).starts(broadcast, {})[PERSONAL].tolist() == [3, 7, 0, 0, 0, 0]


@pytest.mark.parametrize("mix", [-0.1, 1.1, float("nan")])
def test_a_mix_outside_its_range_is_refused(mix: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.mix is .* between 0 and 1, not"):
        FedDpa(mix=mix)
