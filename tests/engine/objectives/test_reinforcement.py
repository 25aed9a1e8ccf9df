"""Objectives on own samples: a step is that of its completions, however it is cut, and evaluation is by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.config.federation import Federation
from engine.config.privacy import Privacy
from engine.config.sections import Clients, Zero
from engine.config.train import Sgd, Train
from engine.messages.errors import RunError
from engine.objectives.base import Context, step_loss
from engine.objectives.reinforcement.grpo import Grpo
from engine.objectives.reinforcement.rewards import Length, Words
from engine.objectives.reinforcement.rloo import Rloo
from engine.objectives.sampling import Completion
from engine.training.lanes import LaneTrainer
from engine.training.local_training import LocalTrainer
from engine.training.per_example import PrivateTrainer
from engine.training.step_loop import Trained, Training
from strategies.averaging.reweighting import QFedAvg
from strategies.core.seeds import sample_key
from strategies.privacy.accounting import Scheme
from strategies.privacy.budget import ExampleDp, ExamplePlan
from strategies.privacy.noise import seeded_words

PROMPTS = ["", "say the", "name a color: ", "one and two are ", "count to ten: ", "the cat sat "]
# Random models write random bytes: some more of them decode to letters.
REWARDS = (Length(target=6, unit="characters"), Words(words=("the", "end", "and"), weight=2.0))
OBJECTIVES = [
    Grpo(rewards=REWARDS, num_generations=3, max_completion_length=5),
    Grpo(rewards=REWARDS, num_generations=2, max_completion_length=4, loss_type="grpo", beta=0.2),
    Grpo(rewards=REWARDS, num_generations=3, max_completion_length=5, loss_type="dr_grpo", scale_rewards="none"),
    Grpo(rewards=REWARDS, num_generations=3, max_completion_length=5, loss_type="cispo", scale_rewards="batch"),
    Rloo(rewards=REWARDS, num_generations=3, max_completion_length=5, reference="round"),
    Rloo(rewards=REWARDS, num_generations=3, max_completion_length=5, beta=0.3, normalize_advantages=True),
]
ONE_STEP = Train(steps=1, batch=6, optimizer=Sgd(lr=1.0), clip=0, max_length=64)
KEYS = partial(sample_key, 7, 2, 5)
Moved = Callable[..., torch.Tensor]


@pytest.fixture(params=OBJECTIVES, ids=lambda objective: f"{objective.kind}-{vars(objective).get('loss_type')}")
def objective(request):
    return request.param


@pytest.fixture
def rows(tokenizer):
    def made(objective, prompts=PROMPTS, length=64, **columns):
        table = pa.table({"prompt": prompts, **columns})
        (batch,) = objective.encode(table, tokenizer, length).combine_chunks().to_batches()
        return batch

    return made


def training(trainer: LocalTrainer, rows: pa.RecordBatch, moved: Moved, seed: int = 1, **options: Any) -> Training:
    return Training(
        rows, moved(trainer), np.random.default_rng(seed), 0, reference=moved(trainer, 8), keys=KEYS, **options
    )


def completed(trainer: LocalTrainer, rows: pa.RecordBatch, numbers: list[int], step: int = 0) -> pa.RecordBatch:
    """The completions of some rows by the vector now in the model, each row by itself."""
    objective = trainer.objective
    parts = []
    for number in numbers:
        keys = [KEYS(step, number, sample) for sample in range(objective.sampling.samples)]
        row = rows.slice(number, 1)
        once = trainer.sampler.completed(row, lambda _, sample, keys=keys: keys[sample], objective.sampling.samples, 1)
        parts += [
            Completion(np.array(ids[len(row["input_ids"][0]) :]), np.array(logprobs), bool(ended))
            for ids, logprobs, ended in zip(*samples_of(once), strict=True)
        ]
    return objective.completed(rows.take(pa.array(numbers)), parts, trainer.context)


def samples_of(once: pa.RecordBatch) -> tuple[list[Any], list[Any], list[Any]]:
    """Token ids, log-probabilities and ends of the samples of one completed row."""
    group = once["reward"].type.list_size
    ids = [once[f"sample{g}_ids"][0].as_py() for g in range(group)]
    return ids, [once[f"sampled{g}"][0].as_py() for g in range(group)], once["ended"][0].as_py()


def order(seed: int, rows: int) -> list[int]:
    return np.random.default_rng(seed).permutation(rows).tolist()


def by_hand(trainer: LocalTrainer, samples: pa.RecordBatch, moved: Moved, vector: torch.Tensor) -> tuple[Any, float]:
    """The gradient at a vector of the loss of completed rows in one batch, and the loss."""
    objective, trainable = trainer.objective, trainer.trainable
    trainable.flat.data.copy_(vector)
    trainable.network.eval()
    batch = objective.collate(samples, 0)
    if objective.reads_reference:
        with trainer.as_reference(moved(trainer, 8)):
            batch = batch.plus(objective.reference_columns(trainable.network, batch, Context()))
    counts = objective.counts(batch)
    for name in objective.means:
        term = objective.step_terms(trainable.network, batch, Context())[name]
        batch = batch.plus({name: (term.total() / counts[name]).expand(len(batch.ids_BT))})
    trainable.grad.zero_()
    terms = objective.terms(trainable.network, batch, Context())
    loss = step_loss(objective, {name: term.total() for name, term in terms.items()}, counts)
    loss.backward()
    return trainable.grad.clone(), loss.item()


@pytest.mark.parametrize("train", [replace(ONE_STEP, batch=2, accumulate=3, max_length=12), ONE_STEP])
def test_a_step_is_that_of_its_completions_in_any_pieces(objective, make_double, rows, moved, train):
    trainer, encoded = make_double(objective, train), rows(objective)
    trained = trainer.train([training(trainer, encoded, moved)], train)[0]
    trainer.become(moved(trainer))
    gradient, loss = by_hand(trainer, completed(trainer, encoded, order(1, 6)), moved, moved(trainer))
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(moved(trainer) - trained.end, gradient, rtol=0, atol=1e-10)
    assert trained.metrics["loss"] == pytest.approx(loss, abs=1e-10)
    samples = 6 * objective.num_generations
    assert trained.metrics["units.length"] == samples and trained.metrics["units.signal"] == 6
    assert trained.metrics["term.length"] * samples <= trained.metrics["tokens"]
    assert 0 < trained.metrics["term.signal"] <= 1 and trained.metrics["term.failed"] == 0


def judged(trained: Trained) -> dict[str, float]:
    return {name: value for name, value in trained.metrics.items() if name != "tokens"}


@pytest.mark.parametrize("every", [1, 2])
def test_a_client_in_lanes_is_the_same_client_alone(objective, make_double, rows, moved, every):
    """Clients of one, two and six rows, so that lanes have prompts and sequences to fill, and turns without a piece."""
    train, objective = replace(ONE_STEP, steps=3, batch=2, accumulate=2), replace(objective, every=every)
    trainer, encoded = make_double(objective, train), rows(objective)
    parts = [encoded.slice(0, 1), encoded.slice(1, 2), encoded]
    alone = [trainer.train([training(trainer, part, moved, seed)], train)[0] for seed, part in enumerate(parts)]
    trainings = [training(trainer, part, moved, seed) for seed, part in enumerate(parts)]
    together = LaneTrainer(trainer, 3, train).train(trainings, train)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.end, expected.end, rtol=0, atol=1e-10)
        assert judged(ours) == pytest.approx(judged(expected), abs=1e-9)


def test_a_lane_that_is_left_to_the_next_client_gets_its_completions_when_they_are_due(make_double, rows, moved):
    """Two lanes for three clients: the last one comes while the other lane is in the middle of its completed steps."""
    objective = replace(OBJECTIVES[0], every=3)
    train = replace(ONE_STEP, steps=None, epochs=1, batch=1)
    trainer, encoded = make_double(objective, train), rows(objective)
    parts = [encoded.slice(0, 5), encoded.slice(1, 1), encoded.slice(2, 4)]
    alone = [trainer.train([training(trainer, part, moved, seed)], train)[0] for seed, part in enumerate(parts)]
    trainings = [training(trainer, part, moved, seed) for seed, part in enumerate(parts)]
    for ours, expected in zip(LaneTrainer(trainer, 2, train).train(trainings, train), alone, strict=True):
        torch.testing.assert_close(ours.end, expected.end, rtol=0, atol=1e-10)


def test_later_steps_are_corrected_by_the_ratio_to_the_weights_that_have_sampled(make_double, rows, moved):
    objective = replace(OBJECTIVES[1], every=2, importance_sampling_level="sequence", epsilon=10.0)
    train = replace(ONE_STEP, steps=2, batch=3, optimizer=Sgd(lr=2.0))
    trainer, encoded = make_double(objective, train), rows(objective)
    trained = trainer.train([training(trainer, encoded, moved)], train)[0]
    start, numbers = moved(trainer), order(1, 6)
    trainer.become(start)
    first, second = (completed(trainer, encoded, numbers[3 * step : 3 * step + 3], step) for step in (0, 1))
    vector = start - 2 * by_hand(trainer, first, moved, start)[0]
    gradient = by_hand(trainer, second, moved, vector)[0]
    # The log-probabilities that were sampled with are kept in float32.
    torch.testing.assert_close(trained.end, vector - 2 * gradient, rtol=0, atol=1e-5)
    uncorrected = by_hand(replaced(trainer, replace(objective, every=1)), second, moved, vector)[0]
    assert (uncorrected - gradient).norm() > 1e-2 * gradient.norm()


def replaced(trainer: LocalTrainer, objective: Any) -> LocalTrainer:
    trainer.objective = objective
    return trainer


def test_a_group_is_the_unit_of_privacy(objective, make_double, rows, moved):
    """With a clip above all norms the private step is the mean of the groups' own, below them each has its norm."""
    if objective.couples_rows:
        return
    trainer, encoded = make_double(objective, ONE_STEP), rows(objective)
    trainer.become(moved(trainer))
    groups = [completed(trainer, encoded, [row]) for row in range(6)]
    each = torch.stack([by_hand(trainer, group, moved, moved(trainer))[0] for group in groups])
    norms = each.norm(dim=1)
    for clip in (1e6, 0.5 * norms[norms > 0].min().item()):
        plan = ExamplePlan(0.0, clip, Scheme("poisson", 1.0), 1e-5)
        private = PrivateTrainer(trainer, plan, seeded_words(np.random.default_rng(1)))
        step = moved(trainer) - private.train([training(trainer, encoded, moved)], ONE_STEP)[0].end
        factors = (clip / norms.clamp(min=1e-30)).clamp(max=1)
        torch.testing.assert_close(step, (factors[:, None] * each).mean(0), rtol=1e-5, atol=1e-7)


def test_an_empty_private_sample_completes_nothing(make_double, rows, moved):
    objective = OBJECTIVES[2]
    train = replace(ONE_STEP, steps=4, batch=1)
    trainer, encoded = make_double(objective, train), rows(objective)
    plan = ExamplePlan(0.0, 1.0, Scheme("poisson", 1.0), 1e-5)
    private = PrivateTrainer(trainer, plan, seeded_words(np.random.default_rng(1)))
    trained = private.train([training(trainer, encoded, moved, seed=3)], train)[0]  # of 0, 2, 0 and 1 rows
    sizes = [len(numbers) for numbers in private.batches(6, train, np.random.default_rng(3))]
    assert 0 in sizes and trained.metrics["units.signal"] == sum(sizes)


def test_held_out_prompts_are_judged_beside_the_reference_by_the_same_random_numbers(make_double, rows, moved):
    objective = replace(OBJECTIVES[0], rewards=(Length(target=6, unit="characters"),))
    trainer, encoded = make_double(objective, ONE_STEP), rows(objective)
    start, reference = moved(trainer, 5, 0.3), moved(trainer, 8, 0.3)
    keys = partial(sample_key, 1, -1, 3, 0)
    trainer.become(start)
    terms = trainer.loss_terms(encoded, 4, reference, keys)
    assert torch.equal(trainer.trainable.flat.data, start)
    assert set(terms) == set(objective.heldout_terms)
    ours = trainer.sampler.completed(encoded, keys, 1, 6)
    likeliest = trainer.sampler.completed(encoded, lambda row, sample: None, 1, 6)
    trainer.become(reference)
    theirs = trainer.sampler.completed(encoded, keys, 1, 6)
    texts = [[text[0] for text in part["text"].to_pylist()] for part in (ours, likeliest, theirs)]
    rewards = np.array([[max(0, 1 - abs(len(text.strip()) - 6) / 6) for text in part] for part in texts])
    assert terms["reward"] == (pytest.approx(rewards[0].sum()), 6) and terms["cost"] == (-terms["reward"][0], 6)
    assert terms["greedy"] == (pytest.approx(rewards[1].sum()), 6)
    wins = (rewards[0] > rewards[2]).sum() + (rewards[0] == rewards[2]).sum() / 2
    assert terms["win"] == (wins, 6) and 0 < wins < 6
    assert terms["failed"] == (0, 6)
    assert terms["kl"][0] == pytest.approx(log_ratios(trainer, ours, start, reference), abs=1e-8)
    trainer.become(start)
    assert trainer.loss_terms(encoded, 6, start, keys)["win"] == (3, 6)
    assert trainer.loss_terms(encoded, 6, start, keys)["kl"][0] == 0
    trainer.objective = replace(objective, reference="none")
    assert set(trainer.loss_terms(encoded, 6, None, keys)) == set(trainer.objective.heldout_terms)


def log_ratios(trainer: LocalTrainer, samples: pa.RecordBatch, vector: torch.Tensor, reference: torch.Tensor) -> float:
    """The sum over completions of their log-probability by a vector minus that by the reference."""
    batch, sums = trainer.objective.collate(samples, 0), []
    for each in (vector, reference):
        trainer.become(each)
        with torch.no_grad():
            logits = trainer.trainable.network(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
        log_chances = logits[:, :-1].log_softmax(-1).gather(2, batch.ids_BT[:, 1:, None])[..., 0]
        sums.append(log_chances[batch.row_N, batch.place_N].sum().item())
    return sums[0] - sums[1]


def test_nothing_is_learned_from_a_masked_completion(make_double, rows, moved):
    """No completion of a random model ends within three tokens: with the mask there is no gradient at all."""
    objective = replace(OBJECTIVES[0], max_completion_length=3, mask_truncated_completions=True)
    trainer, encoded = make_double(objective, ONE_STEP), rows(objective)
    trainer.become(moved(trainer))
    samples = completed(trainer, encoded, list(range(6)))
    ended = np.array(samples["ended"].to_pylist()).ravel()
    batch = objective.collate(samples, 0)
    assert set(batch.row_N.tolist()) == set(np.flatnonzero(ended)) and not ended.all()
    plain = replace(objective, mask_truncated_completions=False).collate(samples, 0)
    assert len(set(plain.row_N.tolist())) == 18
    assert objective.counts(batch)["length"] == 18


def test_the_same_completions_in_batches_of_any_size(make_double, rows, moved):
    objective = OBJECTIVES[0]
    trainer, encoded = make_double(objective, ONE_STEP), rows(objective)
    trainer.become(moved(trainer))
    keys = partial(sample_key, 1, 0, 3, 0)
    whole, by_two = (trainer.sampler.completed(encoded, keys, objective.sampling.samples, size) for size in (6, 2))
    assert whole["text"].equals(by_two["text"]) and len({*map(str, whole["text"].to_pylist())}) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, 'set train.objective.loss_type = "dr_grpo"'),
        ({"loss_type": "grpo", "scale_rewards": "batch"}, 'set train.objective.scale_rewards = "group"'),
        ({"loss_type": "cispo", "scale_rewards": "batch"}, 'loss_type = "dr_grpo" and .*scale_rewards = "group"'),
    ],
)
def test_what_couples_groups_is_refused_beside_privacy_of_rows(training, options, sentence):
    objective = Grpo(rewards=REWARDS, **options)
    with pytest.raises(RunError, match=sentence):
        training(replace(ONE_STEP, objective=objective), privacy=Privacy(dp=ExampleDp(noise_multiplier=1.0)))


def refused(federation: Federation, objective: Grpo, **sections: Any) -> None:
    replace(federation, train=replace(ONE_STEP, objective=objective), **sections)


def test_where_nothing_can_be_sampled_or_compared_it_is_refused(federation):
    objective = Grpo(rewards=REWARDS)
    with pytest.raises(RunError, match=r"samples completions, and the ranks of a gang"):
        refused(federation, objective, clients=Clients(zero=Zero()))
    with pytest.raises(RunError, match=r"has no loss to compare clients by before they train"):
        refused(federation, objective, strategy=QFedAvg())
    with pytest.raises(RunError, match=r'beta weighs the distance from a reference model: set .*reference = "start"'):
        Grpo(rewards=REWARDS, beta=0.1, reference="none")
