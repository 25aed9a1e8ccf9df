import pytest
import torch

from engine.config.train import DECAYS, AdamW, Sgd, TorchOptimizer
from engine.training.optimizers import clip, kept, make_optimizer, reset, restore, state_vectors

TORCH = {
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "AdamW": {"amsgrad": True},
    "Adam": {},
    "RAdam": {},
    "NAdam": {},
    "Adamax": {},
    "Adafactor": {},
    "Adadelta": {},
    "Adagrad": {"initial_accumulator_value": 0.5},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {"t0": 1.0},
}
EACH = [
    AdamW(lr=0.1, weight_decay=0.1),
    Sgd(lr=0.1, momentum=0.9),
    *(TorchOptimizer(name=name, lr=0.1, options=options) for name, options in TORCH.items()),
]
IDS = ["adamw", "sgd", *TORCH]
GRADS = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -1.0]), torch.tensor([-1.0, 0.25, 2.0])]


VECTORS = [2, 1, 1, 3, 2, 2, 2, 2, 1, 2, 1, 3, 2, 1]  # of EACH: moments, averages, and what else is as long


@pytest.mark.parametrize(("settings", "vectors"), zip(EACH, VECTORS, strict=True), ids=IDS)
def test_a_state_has_as_many_vectors_as_the_optimizer_keeps(settings: object, vectors: int) -> None:
    assert state_vectors(settings) == vectors  # type: ignore[arg-type]
    assert state_vectors(Sgd()) == 0


def flat() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))


def stepped(optimizer: torch.optim.Optimizer, start: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    (vector,) = optimizer.param_groups[0]["params"]
    vector.data.copy_(start)
    for grad in grads:
        vector.grad = grad.clone()
        optimizer.step()
    return vector.detach().clone()


@pytest.mark.parametrize("settings", EACH, ids=IDS)
def test_a_reset_optimizer_is_a_new_one(settings: AdamW | Sgd | TorchOptimizer) -> None:
    used = make_optimizer([flat()], settings)
    stepped(used, flat().detach(), GRADS)
    reset(used)
    again, fresh = (stepped(o, flat().detach(), GRADS) for o in (used, make_optimizer([flat()], settings)))
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("settings", EACH, ids=IDS)
def test_a_client_goes_on_where_its_state_was_kept(settings: AdamW | Sgd | TorchOptimizer) -> None:
    through = stepped(make_optimizer([flat()], settings), flat().detach(), GRADS)
    slot = make_optimizer([flat()], settings)
    halfway = stepped(slot, flat().detach(), GRADS[:1])
    client_state = kept(slot)
    reset(slot)
    stepped(slot, flat().detach(), GRADS[::-1])  # another client
    before = {name: tensor.clone() for name, tensor in client_state.items()}
    restore(slot, client_state)
    assert torch.equal(stepped(slot, halfway, GRADS[1:]), through)
    assert all(torch.equal(client_state[name], tensor) for name, tensor in before.items())


def test_without_a_kept_state_a_client_starts_anew() -> None:
    slot = make_optimizer([flat()], AdamW(lr=0.1))
    first = stepped(slot, flat().detach(), GRADS)
    restore(slot, {})
    assert torch.equal(stepped(slot, flat().detach(), GRADS), first)


def test_what_torch_refuses_is_said() -> None:
    with pytest.raises(ValueError, match=r"torch\.optim\.RAdam refuses its options: "):
        make_optimizer([flat()], TorchOptimizer(name="RAdam", options={"eps": -1.0}))


@pytest.mark.parametrize("most", [0.0, 0.5, 3.0, 100.0])
def test_each_gradient_is_clipped_as_torch_clips_it_alone(most: float) -> None:
    grad_KP = torch.stack([*GRADS, torch.zeros(3)])
    expected = []
    for grad in grad_KP.clone():
        alone = flat()
        alone.grad = grad
        if most:
            torch.nn.utils.clip_grad_norm_([alone], most)
        expected.append(alone.grad)
    clip(grad_KP, most)
    assert torch.equal(grad_KP, torch.stack(expected))


@pytest.mark.parametrize("name", TORCH)
def test_what_decays_without_a_gradient_is_known(name: str) -> None:
    """Torch's own defaults shrink parameters under some rules: as a step with a gradient of zeros shows."""
    settings = TorchOptimizer(name=name, lr=0.1)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], settings)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    moved = not torch.equal(parameter.detach(), torch.ones(3))
    assert moved == any(settings.option(option) for option in DECAYS)
