"""Rounds of the searching rules by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from strategies.black_box.cma_search import CmaSearch, evolution_of
from strategies.black_box.evolution import Evolution
from strategies.black_box.fedbpt import FedBpt
from strategies.black_box.words import Words
from strategies.core.errors import StrategyError
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, Update

PROMPT = Layout(("prompt_embeddings",), ((3,),), choices=7)
NUMBERS = Layout(("prompt_embeddings",), ((4,),))


def started(rule, layout, seed=1):
    return replace(rule.init(torch.zeros(layout.size), layout), seed=seed, population=9)


def test_words_takes_the_candidate_with_the_smallest_sum():
    rule = Words(mutants=4)
    state = started(rule, PROMPT)
    sent = rule.broadcast(state).extras["candidates"].view(5, 3)
    assert torch.equal(sent[0], state.params)
    assert all(int((mutant != state.params).sum()) <= 1 for mutant in sent)
    assert float(sent.min()) >= 0 and float(sent.max()) < 7
    # Two clients: the sums are 5, 9, 4, 9, 9.
    extras = {"nll": torch.tensor([5.0, 9.0, 4.0, 9.0, 9.0]), "learned": torch.tensor([12.0])}
    after = rule.apply(state, Aggregate(2.0, torch.zeros(3), extras, 2))
    assert torch.equal(after.params, sent[2]) and after.round == 1
    tie = rule.apply(state, Aggregate(2.0, torch.zeros(3), {**extras, "nll": torch.full((5,), 4.0)}, 2))
    assert torch.equal(tie.params, state.params)


def test_words_draws_other_mutants_in_each_round_and_the_same_again():
    rule = Words()
    state = started(rule, PROMPT)
    first, again, later = (
        rule.broadcast(each).extras["candidates"] for each in (state, state, replace(state, round=1))
    )
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_words_needs_texts_or_scores_of_the_base():
    assert Words().access == {"score"} and Words(score="match").access == {"generate"}
    assert Words(score="match").judges_by == "match"


def test_cma_moves_as_one_who_has_all_rows():
    rule = CmaSearch(population=6)
    state = started(rule, NUMBERS)
    candidates_LD = rule.broadcast(state).extras["candidates"].view(6, 4).double().numpy()
    losses_L = (candidates_LD**2).sum(1)
    # Two clients have 3 and 5 of the tokens; the losses are sums.
    nll = torch.from_numpy(8 * losses_L).float()
    extras = {"nll": nll, "learned": torch.tensor([8.0])}
    after = rule.apply(state, Aggregate(2.0, torch.zeros(4), extras, 2))
    expected = Evolution.begun(np.zeros(4), 1.0).after(candidates_LD, losses_L)
    np.testing.assert_allclose(after.params.numpy(), expected.mean_D, rtol=1e-6)
    assert float(after.moments["sigma"]) == pytest.approx(expected.sigma, rel=1e-6)
    again = evolution_of(after.params, after.moments)
    assert again.generation == 1 and again.covariance_DD.shape == (4, 4)


def test_a_client_of_cma_sends_sums_and_no_change():
    rule = CmaSearch(population=3)
    sent = rule.broadcast(started(rule, NUMBERS))

    def score(candidates_CP):
        return candidates_CP.double().sum(1), 11.0

    delta, beside = rule.search(4, sent, {}, score)
    assert not delta.any() and float(beside["learned"]) == 11.0
    assert torch.equal(beside["nll"], sent.extras["candidates"].view(3, 4).double().sum(1).float())
    assert not rule.sent_masks(0, NUMBERS)["delta"].any()
    assert rule.floats(sent) == (4 + 12, 3 + 1)


def test_clients_of_fedbpt_draw_by_their_own_numbers():
    rule = FedBpt(population=4, generations=2)
    sent = rule.broadcast(started(rule, NUMBERS))

    def score(candidates_CP):
        return (candidates_CP.double() - 1).square().sum(1), 2.0

    (first, beside), (second, _), (again, _) = (rule.search(client, sent, {}, score) for client in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert float(beside["loss"]) == pytest.approx(float(score((sent.params + first)[None])[0]) / 2, rel=1e-6)
    assert float(beside["squares"]) > 0


def test_the_server_of_fedbpt_takes_means_as_candidates():
    rule = FedBpt(population=5)
    state = started(rule, NUMBERS)
    means = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0]])
    updates = tuple(
        Update(client, 1.0, mean, {"loss": torch.tensor([loss]), "squares": torch.tensor([4.0])})
        for client, (mean, loss) in enumerate(zip(means, (3.0, 1.0, 2.0), strict=True))
    )
    after = rule.apply(state, Aggregate(3.0, torch.zeros(4), {}, 3, updates))
    sigma = np.sqrt(12 / 3 / 2)  # by hand: 12 over three clients, floor(5 / 2) of 5
    expected = replace(Evolution.begun(np.zeros(4), 1.0), sigma=sigma).after(
        means.double().numpy(), np.array([3, 1, 2])
    )
    np.testing.assert_allclose(after.params.numpy(), expected.mean_D, rtol=1e-6)
    assert float(after.moments["client_sigma"]) == pytest.approx(expected.sigma / sigma, rel=1e-6)
    # All weight is the best mean's: one of three has a positive weight.
    assert torch.equal(after.params, means[1])


@pytest.mark.parametrize("rule", [CmaSearch, FedBpt])
def test_a_population_of_one_has_no_order(rule):
    with pytest.raises(StrategyError, match="must be at least 2, not 1"):
        rule(population=1)
