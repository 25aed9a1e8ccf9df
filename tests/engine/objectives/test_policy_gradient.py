"""Advantages and losses of GRPO and RLOO: TRL 1.16.0's, values and gradients, and numbers by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from engine.messages.errors import RunError
from engine.objectives.reinforcement.grpo import Grpo
from engine.objectives.reinforcement.policy_gradient import (
    deviations,
    group_advantages,
    has_others,
    left_out_advantages,
    normalized,
    without_signal,
)
from engine.objectives.reinforcement.rewards import Length
from engine.objectives.reinforcement.rloo import Rloo
from engine.objectives.reinforcement.samples import Sampled

TINY = Path(__file__).resolve().parents[3] / "experiments" / "models" / "tiny"
REWARDS = (Length(target=5),)
NONE = math.nan
TEMPERATURE = 0.8
# Token ids of four prompts and their completions: two groups of two.
PROMPTS = [[7, 8, 9], [7, 8, 9], [20, 21], [20, 21]]
COMPLETIONS = [[30, 31, 32, 33, 34], [40], [50, 51, 52], [60, 61, 62, 63]]
ADVANTAGES = [0.9, -0.7, -0.2, 0.4]


def padded(rows, left=False):
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(fill, rows, strict=True))
    ids = torch.tensor([gap + row if left else row + gap for gap, row in pairs])
    mask = torch.tensor([gap + [1] * len(row) if left else [1] * len(row) + gap for gap, row in pairs])
    return ids, mask


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    shared = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    shared |= {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    return shared | {"temperature": TEMPERATURE, "output_dir": str(tmp_path_factory.mktemp("trl"))}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def network():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def trainer_of(kind, config, tokenizer, rewards=lambda **_: [0.0] * 4):
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    options = {"args": config, "train_dataset": rows, "processing_class": tokenizer, "reward_funcs": rewards}
    made = kind(model=network(), **options)
    made.current_gradient_accumulation_steps = 1
    return made


@pytest.fixture(scope="module")
def grpo(settings, tokenizer):
    return trainer_of(GRPOTrainer, GRPOConfig(**settings), tokenizer)


@pytest.fixture(scope="module")
def rloo(settings, tokenizer):
    return trainer_of(RLOOTrainer, RLOOConfig(**settings), tokenizer)


def completion_logprobs(model):
    """The log-probabilities of the completions' tokens (B, C) at the temperature, and their mask."""
    prompt_ids, prompt_mask = padded(PROMPTS, left=True)
    ids, mask = padded(COMPLETIONS)
    options = {"input_ids": torch.cat([prompt_ids, ids], 1), "attention_mask": torch.cat([prompt_mask, mask], 1)}
    logits = model(**options).logits[:, prompt_ids.shape[1] - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0], mask


def earlier_logprobs(model, spread):
    """Those of other weights, and of a reference: the present ones with some noise."""
    with torch.no_grad():
        logprobs, mask = completion_logprobs(model)
    noise = torch.Generator().manual_seed(4)
    drawn = [torch.randn(logprobs.shape, generator=noise) for _ in range(2)]
    return tuple((logprobs + spread * each) * mask for each in drawn)


def trl_batch(model, spread):
    old, reference = earlier_logprobs(model, spread)
    (prompt_ids, prompt_mask), (ids, mask) = padded(PROMPTS, left=True), padded(COMPLETIONS)
    batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask}
    batch |= {"advantages": torch.tensor(ADVANTAGES), "num_items_in_batch": mask.sum()}
    return batch | {"old_per_token_logps": old, "ref_per_token_logps": reference, "old_logps": old.sum(1)}


def gradient_of(model):
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return gradient


def losses_and_gradients(trainer, objective, spread):
    """TRL's loss and gradient, and ours of the same completions by the same network."""
    model, batch = trainer.model, trl_batch(trainer.model, spread)
    theirs = trainer._compute_loss(model, batch)
    theirs.backward()
    their_gradient = gradient_of(model)
    logprobs, mask = completion_logprobs(model)
    row_N, place_N = mask.nonzero(as_tuple=True)
    old_N, reference_N = (batch[name][row_N, place_N] for name in ("old_per_token_logps", "ref_per_token_logps"))
    sampled = Sampled(logprobs[row_N, place_N], old_N, reference_N, batch["advantages"], row_N)
    ours = objective.unit_losses(sampled).mean()
    ours.backward()
    return (theirs.detach(), their_gradient), (ours.detach(), gradient_of(model))


def assert_equal(theirs, ours):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert theirs[1].norm() > 0
    assert (ours[1] - theirs[1]).norm() <= 1e-5 * theirs[1].norm()


GRPO = Grpo(rewards=REWARDS, num_generations=2, max_completion_length=6, beta=0.1)
OPTIONS = {
    **{f"{name} {level}": {"loss_type": name, "importance_sampling_level": level}
       for name in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo") for level in ("token", "sequence")},
    "no reference": {"beta": 0.0},
    "plain kl": {"use_bias_correction_kl": False},
    "clip higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "two-sided": {"delta": 1.3},
    "cispo cap": {"loss_type": "cispo", "epsilon_high": 1.1},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_and_its_gradient_are_those_of_trls_grpo(grpo, name):
    objective = replace(GRPO, **OPTIONS[name])
    high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    for option in ("loss_type", "importance_sampling_level", "beta"):
        setattr(grpo, option, getattr(objective, option))
    grpo.epsilon_low, grpo.epsilon_high = objective.epsilon, high
    grpo.args.delta, grpo.args.use_bias_correction_kl = objective.delta, objective.use_bias_correction_kl
    assert_equal(*losses_and_gradients(grpo, objective, 0.4))  # ratios from 0.4 to 2.5: some are clipped


def test_the_loss_and_its_gradient_are_those_of_trls_rloo(rloo):
    assert_equal(*losses_and_gradients(rloo, Rloo(rewards=REWARDS), 0.05))
    assert_equal(*losses_and_gradients(rloo, Rloo(rewards=REWARDS), 0.4))


# Rewards of two groups of four; the last two have no group of rewards to compare with, and no reward at all.
TABLE = [[1.0, 0.0, 0.5, 0.25], [1.0, NONE, 3.0, 2.0], [2.0, 2.0, 2.0, 2.0], [NONE, 4.0, NONE, NONE], [NONE] * 4]


SCALES = {"group": deviations, "batch": lambda rewards: deviations(rewards.reshape(1, -1)), "none": lambda _: None}


@pytest.mark.parametrize("scale", SCALES)
def test_the_advantages_are_those_of_trls_grpo(settings, tokenizer, scale):
    options = settings | {"scale_rewards": scale, "num_generations": 4, "beta": 0.0}
    rewards = torch.tensor(TABLE)
    ours = group_advantages(rewards, SCALES[scale](rewards))
    torch.testing.assert_close(
        ours, trl_advantages(GRPOTrainer, GRPOConfig(**options), tokenizer), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_the_advantages_are_those_of_trls_rloo(settings, tokenizer, normalize):
    options = settings | {"normalize_advantages": normalize, "num_generations": 4, "beta": 0.0}
    theirs, rewards = trl_advantages(RLOOTrainer, RLOOConfig(**options), tokenizer), torch.tensor(TABLE)
    ours = left_out_advantages(rewards)
    if normalize:
        having = ours[has_others(rewards)]
        ours = normalized(ours, having.mean(), having.square().mean(), torch.tensor(len(having)))
        ours = torch.where(has_others(rewards), ours, 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def trl_advantages(kind, config, tokenizer):
    """TRL scores completions that we hand it, each with the reward that its first token numbers."""
    given = [reward for group in TABLE for reward in group]

    def rewards(completion_ids, **_):
        return [None if math.isnan(given[ids[0]]) else given[ids[0]] for ids in completion_ids]

    trainer = trainer_of(kind, config, tokenizer, rewards)
    prompts, ids, texts = [[5]] * len(given), [[number, 0] for number in range(len(given))], ["x"] * len(given)
    generated = (prompts, ids, None, texts, None, {}, None, None) if kind is GRPOTrainer else (prompts, ids, texts)
    trainer._generate = lambda _: generated
    advantages = trainer._generate_and_score_completions([{"prompt": "a"}] * len(given))["advantages"]
    assert advantages.abs().max() > 0.5
    return advantages.view(len(TABLE), -1)


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    each, zeros = 0.5 / (math.sqrt(0.5) + 1e-4), [0, 0]
    of_groups = group_advantages(rewards, deviations(rewards))
    torch.testing.assert_close(of_groups, torch.tensor([[-each, each], zeros]).double())
    assert group_advantages(rewards, None).tolist() == [[-0.5, 0.5], zeros]
    of_batch = deviations(rewards.reshape(1, -1))
    assert of_batch.item() == pytest.approx(math.sqrt((1.75**2 + 0.75**2 + 2 * 1.25**2) / 3))
    assert left_out_advantages(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[-3.0, -1.5, 4.5]]
    assert without_signal(torch.tensor(TABLE)).tolist() == [False, False, True, True, True]


def test_a_reward_that_is_missing_moves_nothing():
    without = torch.tensor([[1.0, 4.0, 2.0]])
    beside = torch.tensor([[1.0, NONE, 4.0, 2.0]])
    for advantages in (left_out_advantages, lambda rewards: group_advantages(rewards, deviations(rewards))):
        alone = advantages(without).flatten().tolist()
        assert advantages(beside).flatten().tolist() == [alone[0], 0.0, *alone[1:]]


def unit_losses(objective, ratio, advantage, **tokens):
    """Of one sequence of two tokens, of which the first has log-probability -1 and this ratio, and the second 1."""
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    old = logp - torch.tensor([math.log(ratio), 0.0]).double()
    reference = torch.tensor([tokens.get("reference", -1.0), -2.0], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return objective.unit_losses(Sampled(logp, old, reference, advantages, torch.tensor([0, 0]))).tolist()


def test_losses_by_hand():
    plain = replace(GRPO, beta=0.0)
    assert unit_losses(plain, 1.5, 2.0) == pytest.approx([-2.4, -2.0])  # clipped at 1.2
    assert unit_losses(plain, 1.5, -2.0) == pytest.approx([3.0, 2.0])
    assert unit_losses(plain, 0.5, -2.0) == pytest.approx([1.6, 2.0])  # clipped at 0.8
    assert unit_losses(replace(plain, delta=1.3), 1.5, -2.0) == pytest.approx([2.6, 2.0])
    assert unit_losses(replace(plain, loss_type="grpo"), 1.5, 2.0) == pytest.approx([-2.2])
    assert unit_losses(replace(plain, loss_type="dr_grpo"), 1.5, 2.0) == pytest.approx([-4.4 / 6])
    assert unit_losses(replace(plain, loss_type="cispo", epsilon_high=1.25), 1.5, 2.0) == pytest.approx([2.5, 4.0])
    mean = math.sqrt(1.1)
    sequence = replace(plain, importance_sampling_level="sequence")
    assert unit_losses(sequence, 1.1, 2.0) == pytest.approx([-2 * mean, -2 * mean])
    kl = math.exp(0.5) - 0.5 - 1  # d = ln pi_ref - ln pi = 0.5
    corrected = unit_losses(GRPO, 1.1, 0.0, reference=-0.5)
    assert corrected == pytest.approx([0.1 * 1.1 * kl, 0.0])
    plain_kl = replace(GRPO, use_bias_correction_kl=False)
    assert unit_losses(plain_kl, 1.1, 0.0, reference=-0.5) == pytest.approx([0.1 * kl, 0.0])
    assert unit_losses(Rloo(rewards=REWARDS), 1.1, 2.0) == pytest.approx([-2.2])
    assert unit_losses(Rloo(rewards=REWARDS), 1.5, 2.0) == pytest.approx([-2.4])


@pytest.mark.parametrize("kind", [Grpo, Rloo])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rewards": ()}, "rewards is empty"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"every": 0}, "every must be at least 1"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_senseless_options_are_refused(kind, options, sentence):
    with pytest.raises(RunError, match=sentence):
        kind(**({"rewards": REWARDS} | options))
