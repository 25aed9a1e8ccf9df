"""What objectives that learn from rewards of their own samples share: rows, batches, figures and evaluation.

Legend: P rows, each a prompt; G completions of each, B = P G sequences in this order, N tokens of all completions,
C tokens of a completion.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import nn

from datasets_partition.core.turns import conversation_of
from datasets_partition.core.types import OPTIONS, PROMPT_COMPLETION, PROMPT_ONLY
from engine.messages.checks import above, at_least
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from engine.objectives.base import NATS, REFERENCE, BaseObjective, Context, Prompt, Reference, Term, TermSums, Tokenizer
from engine.objectives.reinforcement.completed_rows import (
    COUNT,
    ENDED,
    FAILED,
    OF_SAMPLES,
    PROMPT,
    REWARD,
    SAMPLED,
    SCORED,
    SIZE,
    SPREAD,
    by_sample,
    completed_rows,
    prompt_rows,
    values_of,
)
from engine.objectives.reinforcement.policy_gradient import kl_estimates, without_signal
from engine.objectives.reinforcement.rewards import RewardModel, Rewards
from engine.objectives.sampling import Answers, Completions, Sampling
from engine.objectives.token_batch import Batch, token_losses

KEY = "train.objective"
POLICY = "policy"  # the term of the loss
COST = "cost"  # minus the reward of held-out samples: as of any loss, less of it is better
START = "start"  # a column of batches: the place before the first token of a completion (B,)
UNITS = {
    POLICY: "policy loss",
    COST: "minus the reward",
    "reward": "reward",
    "greedy": "reward",
    "win": "share",
    "length": "tokens",
    "ended": "share",
    "signal": "share",
    "failed": "share",
    "kl": "nats",
}


class Sampled(NamedTuple):
    """What is known of sampled completions: log-probabilities of each token, and each sequence's advantage.

    `logp_N` is by the present weights, `old_N` by those that sampled, `reference_N` by the reference model.
    """

    logp_N: torch.Tensor
    old_N: torch.Tensor
    reference_N: torch.Tensor | None
    advantage_B: torch.Tensor
    row_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Reinforcement(BaseObjective):
    """The options that all have, by TRL's names where TRL has them.

    Each step's prompts are completed `num_generations` times by the model itself, `every` steps' prompts at once; the
    ratio to the weights that have sampled corrects later steps. A prompt and `max_completion_length` tokens fit into
    `train.max_length` together, or the row is dropped. With `mask_truncated_completions` nothing is learned from a
    completion that has not ended. `beta` weighs the distance from the reference model; without it, that model is used
    in evaluation alone.
    """

    kind: str
    rewards: tuple[Annotated[Rewards, Field(discriminator="kind")], ...]
    num_generations: int = 8
    max_completion_length: int = 64
    temperature: float = 1.0
    every: int = 1
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    mask_truncated_completions: bool = False
    reference: Reference = "start"
    formats: ClassVar[tuple[str, ...]] = (PROMPT_ONLY, PROMPT_COMPLETION)
    heldout: ClassVar[str] = COST
    units: ClassVar[Mapping[str, str]] = UNITS
    shown: ClassVar[tuple[str, ...]] = ("reward", "greedy", "win")

    def __post_init__(self) -> None:
        if not self.rewards:
            raise RunError(f"{KEY}.rewards is empty: name at least one reward")
        at_least(KEY, 2, num_generations=self.num_generations)
        at_least(KEY, 1, max_completion_length=self.max_completion_length, every=self.every)
        at_least(KEY, 0, beta=self.beta, epsilon=self.epsilon, epsilon_high=self.epsilon_high)
        above(KEY, 0, temperature=self.temperature)
        if self.beta > 0 and self.reference == "none":
            raise RunError(f'{KEY}.beta weighs the distance from a reference model: set {KEY}.reference = "start"')

    @abstractmethod
    def advantages(self, rewards_PG: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Computes the advantages (P, G) of a batch's rewards, NaN where there is none."""

    @abstractmethod
    def unit_losses(self, sampled: Sampled) -> torch.Tensor:
        """Computes the loss of each token (N,), or of each sequence (B,)."""

    @property
    def by_sequence(self) -> bool:
        """Whether the loss has a value for each sequence."""
        return True

    @property
    def losses(self) -> Mapping[str, float]:
        """The policy's loss."""
        return {POLICY: NATS}

    @property
    def figures(self) -> Mapping[str, float]:
        """The samples' rewards, lengths and ends, and groups and samples that teach nothing."""
        most = sum(abs(reward.weight) * reward.most for reward in self.rewards)
        figures = {"reward": most, "length": 1.0, "ended": 1.0, "signal": 1.0, "failed": 1.0}
        return {**figures, "kl": NATS} if self.beta > 0 else figures

    @property
    def heldout_terms(self) -> tuple[str, ...]:
        """What evaluation measures: see `judged`."""
        beside = () if self.reference == "none" else ("win", "kl")
        return (COST, "reward", "greedy", "length", "ended", "failed", *beside)

    @property
    def judges_samples(self) -> bool:
        """By their rewards."""
        return True

    @property
    def reads_reference(self) -> bool:
        """Only for the distance from it."""
        return self.beta > 0

    @property
    def sampling(self) -> Sampling:
        """How a step's prompts are completed."""
        return Sampling(self.num_generations, self.max_completion_length, self.temperature, self.every)

    @property
    def sequences(self) -> int:
        """The samples of a prompt."""
        return self.num_generations

    @property
    def encoding(self) -> str:
        """The columns that rewards read, and the room for completions."""
        return f"prompts/{self.max_completion_length}/{self.reads}"

    @property
    def models(self) -> tuple[FrozenModel, ...]:
        """The reward models."""
        return tuple(FrozenModel(each.model, each.revision, each.base, scores=True) for each in self._reward_models())

    def with_models(self, models: Sequence[FrozenModel]) -> Self:
        """Takes other reward models."""
        others, rewards = iter(models), list[Rewards]()
        for reward in self.rewards:
            if isinstance(reward, RewardModel):
                other = next(others)
                reward = replace(reward, model=other.model, revision=other.revision, base=other.base)
            rewards.append(reward)
        return replace(self, rewards=tuple(rewards))

    def _reward_models(self) -> list[RewardModel]:
        return [reward for reward in self.rewards if isinstance(reward, RewardModel)]

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The columns that the rewards read; None: all."""
        reads = [reward.reads for reward in self.rewards]
        return None if None in reads else tuple(sorted({name for names in reads for name in names or ()}))

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes `input_ids` of the prompt, null if it leaves no room for a completion, and what rewards are given.

        RunError if a reward reads a column that the rows lack.
        """
        names = [name for name in rows.column_names if name not in ("prompt", OPTIONS)]
        if missing := [name for name in self.reads or () if name not in names]:
            have = f"they have {', '.join(names)}" if names else "they are prompts alone"
            raise RunError(
                f"{KEY}.rewards read the column {missing[0]!r}, which the rows lack ({have}): name another in the "
                f"reward's column, or one of the source's in data.source.columns"
            )
        return prompt_rows(rows, self.reads, tokenizer, max_length - self.max_completion_length)

    def completed(self, rows: pa.RecordBatch, completions: Completions, context: Context) -> pa.RecordBatch:
        """Makes rows of a step's prompts with their completions and rewards, which `collate` takes."""
        return completed_rows(rows, completions, self.rewards, context)

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of a sequence for each completion of `completed`."""
        group = rows[REWARD].type.list_size
        columns = {name: values_of(rows, name) for name in OF_SAMPLES}
        columns |= {name: rows[name].to_numpy().repeat(group) for name in (SPREAD, COUNT)}
        prompt_B = rows[PROMPT].to_numpy().repeat(group).astype(np.int64)
        size_B = columns[SIZE].astype(np.int64)
        learns_B = columns[ENDED] > 0 if self.mask_truncated_completions else np.ones(len(size_B), bool)
        begin_B = np.where(learns_B, prompt_B, prompt_B + size_B)
        learned = [np.arange(m + n) >= begin for m, n, begin in zip(prompt_B, size_B, begin_B, strict=True)]
        ids = by_sample(rows, "sample{}_ids")
        batch = Batch.padded(np.concatenate(ids), np.concatenate(learned), prompt_B + size_B, pad, group)
        columns |= {START: prompt_B - 1, SAMPLED: np.zeros((len(ids), self.max_completion_length), np.float32)}
        for place, logprobs in enumerate(by_sample(rows, SAMPLED + "{}")):
            columns[SAMPLED][place, : len(logprobs)] = logprobs
        return batch.plus({name: torch.tensor(values) for name, values in columns.items()})

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of each term's units: tokens or completions, groups, completions that have a reward."""
        scored, samples = int(batch.columns[SCORED].sum()), batch.units * batch.group
        counts = {POLICY: samples if self.by_sequence else batch.learned, "reward": scored, "signal": batch.units}
        counts |= dict.fromkeys(("length", "ended", "failed"), samples)
        return {**counts, "kl": batch.learned} if self.beta > 0 else counts

    def reference_columns(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, torch.Tensor]:
        """Returns the log-probability of each learned token (B, C)."""
        logp_N = self._logprobs(network, batch, context)
        logp_BC = logp_N.new_zeros(len(batch.ids_BT), self.max_completion_length)
        logp_BC[self._places(batch)] = logp_N
        return {REFERENCE: logp_BC}

    def _logprobs(self, network: nn.Module, batch: Batch, context: Context) -> torch.Tensor:
        return -token_losses(network, batch, every_logit=context.every_logit, temperature=self.temperature)

    def _places(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns where the learned tokens stand in columns (B, C)."""
        return batch.row_N, batch.place_N - batch.columns[START][batch.row_N]

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the policy's loss, and figures of the samples; "signal" is the share of groups with advantages.

        If a step's own weights have sampled, the ratio is 1 and only has a gradient.
        """
        columns, places = batch.columns, self._places(batch)
        logp_N = self._logprobs(network, batch, context)
        old_N = logp_N.detach() if self.every == 1 else columns[SAMPLED][places].to(logp_N.dtype)
        reference_N = columns[REFERENCE][places] if self.beta > 0 else None
        rewards_PG = self._rewards(batch, logp_N.dtype)
        advantage_B = self.advantages(rewards_PG, batch).flatten()
        losses = self.unit_losses(Sampled(logp_N, old_N, reference_N, advantage_B, batch.row_N))
        sequence_B = torch.arange(len(batch.ids_BT), device=losses.device)
        real_B = columns[SIZE] > 0  # others fill a lane
        row_U = sequence_B if self.by_sequence else batch.row_N
        terms = {POLICY: Term(torch.where(real_B, losses, 0) if self.by_sequence else losses, row_U)}
        figures = {"reward": REWARD, "length": SIZE, "ended": ENDED, "failed": FAILED}
        terms |= {name: Term(columns[column].to(losses.dtype), sequence_B) for name, column in figures.items()}
        signal_P = (~without_signal(rewards_PG)).to(losses.dtype)
        terms["signal"] = Term(signal_P, sequence_B[:: batch.group])
        if reference_N is not None:
            terms["kl"] = Term(kl_estimates(logp_N.detach(), reference_N), batch.row_N)
        return terms

    def _rewards(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """The rewards (P, G), NaN where there is none."""
        reward_B = torch.where(batch.columns[SCORED] > 0, batch.columns[REWARD], torch.nan)
        return reward_B.to(dtype).view(-1, batch.group)

    def judged(self, answers: Answers) -> TermSums:
        """Returns the terms of held-out prompts, "reward" and what follows it of the samples.

        "win" is the share of prompts on which the model has a larger reward than the reference model, ties one half;
        "kl" the mean log-ratio of a whole completion, which estimates the KL divergence.
        """
        given, referred, kl_B = answers
        values = {name: values_of(given, name).reshape(-1, 2) for name in OF_SAMPLES}
        terms: TermSums = {}
        for place, name in enumerate(("reward", "greedy")):
            of_place = values[REWARD][:, place][values[SCORED][:, place] > 0]
            terms[name] = of_place.sum().item(), len(of_place)
        terms[COST] = -terms["reward"][0], terms["reward"][1]
        for name, column in (("length", SIZE), ("ended", ENDED), ("failed", FAILED)):
            terms[name] = values[column][:, 0].sum().item(), given.num_rows
        if referred is not None and kl_B is not None:
            theirs = {name: values_of(referred, name)[::2] for name in (REWARD, SCORED)}
            both = (values[SCORED][:, 0] > 0) & (theirs[SCORED] > 0)
            difference = (values[REWARD][:, 0] - theirs[REWARD])[both]
            terms["win"] = (np.sign(difference) + 1).sum().item() / 2, len(difference)
            terms["kl"] = kl_B.double().sum().item(), len(kl_B)
        return terms

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt, and the answer if the row has one."""
        if isinstance(row["prompt"], str):
            return row["prompt"], row.get("completion", "")
        return conversation_of(row["prompt"], row.get(OPTIONS)), ""
