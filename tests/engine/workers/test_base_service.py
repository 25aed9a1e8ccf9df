"""What the owner of a base answers at each level, and what a client without the base makes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config.access import Access, Jitter, Lower, Price, Remove, ReplaceBase
from engine.config.prefixes import Prompt, PromptWords
from engine.config.train import Sgd
from engine.messages.errors import AccessDenied, BaseRemoved
from engine.training.local_training import Job, LocalTrainer
from engine.training.remote_training import RemoteTrainer
from engine.training.searching import SearchTrainer, halves_of, judge_at_home, mismatches
from engine.workers.base_service import BaseService
from strategies.black_box.words import Words
from strategies.core.access import GRANTS, LEVELS
from strategies.core.protocol import Broadcast

N = 3


@pytest.fixture
def served(bases, federation, make_trainable, tokenizer):
    """A service, and the federation of its clients, for a kind at a level."""

    def made(peft=None, rule=None, base="tied", **access):
        peft = peft or Prompt(n=N)
        model = replace(federation.model, peft=peft, access=Access(**access))
        train = replace(federation.train, optimizer=Sgd(lr=0.5))
        its = replace(federation, model=model, train=train, strategy=rule or federation.strategy)

        def trainer(folder):
            return LocalTrainer(make_trainable(folder, peft.injected), 0, train, tokenizer)

        return its, BaseService(trainer(bases[base]), its.model.access, peft.sent, N, tokenizer, trainer)

    return made


def job_of(rows, vector, client=4, **extras):
    return Job(client, rows, 1.0, Broadcast(0, vector, extras, seed=7), {})


CALLS = {
    "generate": lambda service, rows, vector: service.write(1, vector, [np.array([5, 6])], [2]),
    "score": lambda service, rows, vector: service.score(1, vector[None], rows, 8),
    "inject": lambda service, rows, vector: service.score(1, vector[None], rows, 8),
    "input_gradients": lambda service, rows, vector: service.gradient(1, vector, rows, 8),
}


@pytest.mark.parametrize("level", [level for level in LEVELS if "weights" not in GRANTS[level]])
@pytest.mark.parametrize("capability", CALLS)
def test_each_capability_is_granted_or_denied_whatever_the_caller_says(served, rows, level, capability, bases):
    words = capability in ("generate", "score")
    peft = PromptWords(n=N) if words else Prompt(n=N)
    # The service is made by hand, since a recipe would be refused before.
    _, service = served(peft, Words() if words else None)
    service.access = Access(level=level)
    vector = service.trainer.trainable.initial.numpy()
    if capability in GRANTS[level]:
        assert CALLS[capability](service, rows, vector).usage.read > 0
        return
    with pytest.raises(AccessDenied, match=f'"{capability}", which the level "{level}" of model.access does not grant'):
        CALLS[capability](service, rows, vector)


def test_gradients_of_the_owner_are_those_at_home(served, rows):
    federation, service = served(level="api_gradients", price=Price(input=1.0, output=2.0, per=1000))
    vector = service.trainer.trainable.initial.clone()
    remote = RemoteTrainer(service, federation, vector, None)
    ((update, _),) = remote.updates([job_of(rows, vector)], federation)
    home = replace(federation, model=replace(federation.model, access=Access()))
    ((expected, _),) = service.trainer.updates([job_of(rows, vector)], home)
    assert torch.equal(update.delta, expected.delta) and update.metrics == expected.metrics
    assert update.delta.any()
    shown = remote.taken(4)
    assert [exposure.kind for exposure in shown] == ["vector"] * federation.train.steps and not remote.taken(4)
    assert sum(len(exposure.rows) for exposure in shown) == 2 + 2 + 1  # three steps of two rows, five rows
    tokens = update.metrics["tokens"] + N * 5
    assert sum(exposure.usage.read for exposure in shown) == tokens
    assert sum(exposure.usage.cost for exposure in shown) == pytest.approx(tokens / 1000)


def test_scores_of_the_owner_are_those_at_home(served, rows):
    federation, service = served(PromptWords(n=N), Words(mutants=3), level="api_logprobs")
    vector = service.trainer.trainable.initial.clone()
    candidates_CP = torch.stack([vector, vector + 1, vector + 2, vector])
    remote = RemoteTrainer(service, federation, vector, None)
    job = job_of(rows, vector, candidates=candidates_CP.reshape(-1))
    ((update, _),) = SearchTrainer(remote.judged).updates([job], federation)
    home = SearchTrainer(judge_at_home(service.trainer, federation.train.batch, "loss"))
    ((expected, _),) = home.updates([job], federation)
    for name in ("nll", "learned"):
        assert torch.equal(update.extras[name], expected.extras[name])
    assert float(update.extras["nll"][0]) == float(update.extras["nll"][3]) != float(update.extras["nll"][1])
    # By hand: the loss of all rows behind the first prompt.
    service.trainer.become(vector)
    total, units = service.trainer.loss_terms(rows, federation.train.batch)["nll"]
    assert float(update.extras["nll"][0]) == pytest.approx(total) and float(update.extras["learned"]) == units
    (exposure,) = remote.taken(4)
    assert (exposure.kind, exposure.times, exposure.rows) == ("prompt", 4, (0, 1, 2, 3, 4))
    assert np.isnan(exposure.usage.cost)  # no price is given


def test_a_text_api_judges_by_what_is_written(served, rows, tokenizer):
    federation, service = served(PromptWords(n=N), Words(score="match"), level="api_text")
    vector = service.trainer.trainable.initial.clone()
    remote = RemoteTrainer(service, federation, vector, None)
    losses_C, units = remote.judged(job_of(rows, vector), np.arange(5), rows, vector[None])
    at_home = judge_at_home(service.trainer, 8, "match")(job_of(rows, vector), np.arange(5), rows, vector[None])
    assert losses_C.tolist() == at_home[0].tolist() and units == at_home[1] == 5
    prompts, completions = halves_of(rows)
    assert [len(each) + len(other) for each, other in zip(prompts, completions, strict=True)] == np.diff(
        rows["input_ids"].offsets.to_numpy()
    ).tolist()
    assert tokenizer.decode(completions[3]) == " three<end>"

    def writes_all_but_the_first(candidate, asked, most):
        return [[], *(each.tolist() for each in completions[1:])]

    assert mismatches(rows, vector[None], writes_all_but_the_first)[0].tolist() == [1.0]


def test_what_a_provider_may_do_to_its_clients(served, rows, bases):
    events = (
        ReplaceBase(round=2, to=str(bases["untied"])),
        Lower(round=3, to="api_text"),
        Remove(round=4),
    )
    _, service = served(PromptWords(n=N), Words(), level="api_logprobs", events=events)
    vector = service.trainer.trainable.initial.numpy()
    first, second = (service.score(round_, vector[None], rows, 8) for round_ in (1, 2))
    assert first.losses_C[0] != second.losses_C[0]
    assert service.probe(1) == service.probe(1) != service.probe(2)
    with pytest.raises(AccessDenied, match="in round 3 a client asked"):
        service.score(3, vector[None], rows, 8)
    with pytest.raises(BaseRemoved, match="removed the base in round 4"):
        service.write(5, vector, [np.array([5])], [1])
    before = service.judge(vector, rows, 8)
    assert before == service.judge(vector, rows, 8)  # the simulator's judge has the recipe's base


def test_answers_that_jitter_differ_from_call_to_call(served, rows):
    _, service = served(PromptWords(n=N), Words(), level="api_logprobs", events=(Jitter(round=2, nats=0.01),))
    vector = service.trainer.trainable.initial.numpy()
    calm, again, first, second = (service.score(round_, vector[None], rows, 8).losses_C[0] for round_ in (1, 1, 2, 2))
    assert calm == again and first != second
    assert abs(first - calm) < 0.01 * 10 * service.score(1, vector[None], rows, 8).units
    assert service.probe(2) != service.probe(2)
