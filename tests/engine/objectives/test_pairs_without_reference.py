"""ORPO, CPO and SimPO on numbers worked by hand."""

import math
from collections.abc import Callable

import pyarrow as pa
import pytest
import torch

from engine.config.train import Train
from engine.objectives.base import Context
from engine.objectives.cpo import Cpo, SimPo
from engine.objectives.orpo import Orpo, _log1mexp
from engine.training.local_training import LocalTrainer


def by_hand(network: torch.nn.Module, rows: pa.RecordBatch) -> list[tuple[float, int, float, int, float, int]]:
    """Of each pair s and n of both completions, and the sum and number of nats of the whole chosen row."""
    pairs = []
    for row in rows.to_pylist():
        values: list[float] = []
        for name in ("input_ids", "rejected_ids"):
            ids, prompt = row[name], row["prompt_tokens"]
            logits = network(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            each = [logits[place - 1, ids[place]].item() for place in range(1, len(ids))]
            scored = each[max(0, prompt - 1) :]
            values += [sum(scored), len(scored)]
            if name == "input_ids":
                whole = [-sum(each), len(each)]
        pairs.append((*values, *whole))
    return pairs  # type: ignore[return-value]


@pytest.mark.parametrize("objective", [Orpo(beta=0.3), Cpo(cpo_alpha=0.5, label_smoothing=0.2), SimPo(gamma=0.7)])
def test_terms_are_those_worked_by_hand(
    objective: Orpo | Cpo | SimPo, make_double: Callable[..., LocalTrainer], encoded: Callable[..., pa.RecordBatch]
) -> None:
    rows = encoded(objective)
    network = make_double(objective, Train(steps=1)).trainable.network.eval()
    with torch.no_grad():
        batch = objective.collate(rows, 0)
        terms = {name: term.total().item() for name, term in objective.terms(network, batch, Context()).items()}
        pairs = by_hand(network, rows)

    def lnsig(x: float) -> float:
        return -math.log1p(math.exp(-x))

    means = [(chosen / n, rejected / m) for chosen, n, rejected, m, *_ in pairs]
    if isinstance(objective, Orpo):
        odds = [(w - r) - (math.log1p(-math.exp(w)) - math.log1p(-math.exp(r))) for w, r in means]
        expected = {"preference": sum(-0.3 * lnsig(x) for x in odds), "nll": sum(pair[4] for pair in pairs)}
        assert objective.counts(batch)["nll"] == sum(pair[5] for pair in pairs)
    elif isinstance(objective, Cpo):
        x = [0.1 * (chosen - rejected) for chosen, _, rejected, *_ in pairs]
        expected = {"preference": sum(-0.8 * lnsig(v) - 0.2 * lnsig(-v) for v in x)}
        expected["nll"] = 0.5 * sum(-chosen for chosen, *_ in pairs)
        assert objective.counts(batch)["nll"] == sum(pair[1] for pair in pairs)
    else:
        expected = {"preference": sum(-lnsig(2 * (w - r) - 0.7) for w, r in means)}
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, abs=1e-6)


def test_log1mexp_of_certain_completions_is_finite() -> None:
    a = torch.tensor([-1e-30, -1e-3, -0.7, -20.0], requires_grad=True)
    values = _log1mexp(a)
    values.sum().backward()
    assert values.isfinite().all() and a.grad is not None and a.grad.isfinite().all()
    assert values[1:].tolist() == pytest.approx([math.log(-math.expm1(x)) for x in (-1e-3, -0.7, -20.0)], rel=1e-5)
