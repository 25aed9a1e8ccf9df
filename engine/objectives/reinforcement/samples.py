"""What objectives that learn from rewards of their own samples share: rows, batches, figures and evaluation.

Legend: P rows, each a prompt; G completions of each, B = P G sequences in this order, N tokens of all completions,
C tokens of a completion.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import nn

from datasets_partition.core.turns import Conversation, conversation_of, conversations
from datasets_partition.core.types import OPTIONS, PROMPT_COMPLETION, PROMPT_ONLY
from engine.messages.checks import above, at_least
from engine.messages.errors import RunError
from engine.objectives.base import NATS, REFERENCE, BaseObjective, Context, Prompt, Reference, Term, TermSums, Tokenizer
from engine.objectives.chat_template import rendered_ids
from engine.objectives.reinforcement.policy_gradient import deviations, has_others, kl_estimates, without_signal
from engine.objectives.reinforcement.rewards import Reward, Rewards, Scored, score
from engine.objectives.sampling import Answers, Completion, Completions, Sampling
from engine.objectives.token_batch import Batch, flattened, token_losses

KEY = "train.objective"
POLICY = "policy"  # the term of the loss
PROMPT, TEXT = "prompt_tokens", "text"  # columns of completed rows, beside `sample0_ids`, `sample1_ids`, ...
# Columns of completed rows with a value for each sample, and of batches for each sequence.
REWARD, SCORED, ENDED, FAILED, SIZE = OF_SAMPLES = ("reward", "scored", "ended", "failed", "size")
# Of both, the same for all rows of a step: its rewards' standard deviation, and how many have others in their group.
SPREAD, COUNT = "spread", "count"
# Of batches: the log-probabilities with which tokens were sampled (B, C), and the place before the first of them (B,).
SAMPLED, START = "sampled", "start"
UNITS = {
    POLICY: "policy loss",
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
    heldout: ClassVar[str] = "reward"
    units: ClassVar[Mapping[str, str]] = UNITS

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
        return ("reward", "greedy", "length", "ended", "failed", *beside)

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
        return f"prompts/{self.max_completion_length}/{self._reads()}"

    def _reads(self) -> list[str] | None:
        """The columns that the rewards read; None: all."""
        reads = [reward.reads for reward in self.rewards]
        return None if None in reads else sorted({column for columns in reads for column in columns or ()})

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes `input_ids` of the prompt, null if it leaves no room for a completion, and `row` for the rewards.

        `row` is JSON text as bytes: the prompt, and the columns that the rewards read. An empty prompt becomes an end
        token. RunError if a reward reads a column that the rows lack.
        """
        names = [name for name in rows.column_names if name not in ("prompt", OPTIONS)]
        reads = self._reads()
        if missing := [name for name in reads or () if name not in names]:
            have = f"they have {', '.join(names)}" if names else "they are prompts alone"
            raise RunError(
                f"{KEY}.rewards read the column {missing[0]!r}, which the rows lack ({have}): name another in the "
                f"reward's column, or one of the source's in data.source.columns"
            )
        prompts, ids = _prompts(rows, tokenizer)
        room = max_length - self.max_completion_length
        kept = [row if len(row) <= room else None for row in ids]
        columns = rows.select(names if reads is None else reads).to_pylist() or [{}] * rows.num_rows
        texts = [
            json.dumps({"prompt": prompt, "row": row}, default=str).encode()
            for prompt, row in zip(prompts, columns, strict=True)
        ]
        data = pa.array([np.frombuffer(text, np.uint8) for text in texts], pa.list_(pa.uint8()))
        return pa.table({"input_ids": pa.array(kept, pa.list_(pa.int32())), "row": data})

    def completed(self, rows: pa.RecordBatch, completions: Completions, tokenizer: Tokenizer) -> pa.RecordBatch:
        """Makes rows of a step's prompts with their completions and rewards, which `collate` takes.

        RunError if a reward fails for each of them: no client could learn anything.
        """
        group = len(completions) // max(1, rows.num_rows)
        ids = [completion.ids.tolist() for completion in completions]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        given = [json.loads(bytes(text)) for text in rows["row"].to_pylist()]
        scores = [
            self._scored(given[place // group], text, completion)
            for place, (text, completion) in enumerate(zip(texts, completions, strict=True))
        ]
        failures = [scored.failure for scored in scores if scored.failure is not None]
        if failures and len(failures) == len(scores):
            raise RunError(f"a reward fails for all completions, the first time with {failures[0]}")
        rewards_PG = np.array([math.nan if each.total is None else each.total for each in scores]).reshape(-1, group)
        columns = {
            REWARD: np.nan_to_num(rewards_PG),
            SCORED: ~np.isnan(rewards_PG),
            ENDED: [completion.ended for completion in completions],
            FAILED: [scored.failure is not None for scored in scores],
            SIZE: [len(completion.ids) for completion in completions],
        }
        rewards = torch.from_numpy(rewards_PG)
        spread, count = deviations(rewards.reshape(1, -1)).item(), float(has_others(rewards).sum())
        prompts = rows["input_ids"].to_pylist()
        made: dict[str, Any] = {PROMPT: pa.array([len(prompt) for prompt in prompts], pa.int32())}
        for g in range(group):
            its = completions[g::group]
            sequences = [prompt + completion.ids.tolist() for prompt, completion in zip(prompts, its, strict=True)]
            made[f"sample{g}_ids"] = pa.array(sequences, pa.list_(pa.int32()))
            made[f"{SAMPLED}{g}"] = pa.array([completion.logprobs for completion in its], pa.list_(pa.float32()))
        for name, values in columns.items():
            made[name] = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(values, np.float64).ravel()), group)
        made |= {name: pa.array([value] * len(prompts)) for name, value in ((SPREAD, spread), (COUNT, count))}
        made[TEXT] = pa.FixedSizeListArray.from_arrays(pa.array(texts, pa.string()), group)
        return pa.RecordBatch.from_pydict(made)

    def _scored(self, given: Mapping[str, Any], text: str, completion: Completion) -> Scored:
        facts = {"completion_tokens": len(completion.ids), "ended": completion.ended}
        rewards: Sequence[Reward] = self.rewards
        return score(rewards, given["prompt"], text, {**given["row"], **facts})

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of a sequence for each completion of `completed`."""
        group = rows[REWARD].type.list_size
        columns = {name: _values(rows, name) for name in OF_SAMPLES}
        columns |= {name: rows[name].to_numpy().repeat(group) for name in (SPREAD, COUNT)}
        prompt_B = rows[PROMPT].to_numpy().repeat(group).astype(np.int64)
        size_B = columns[SIZE].astype(np.int64)
        learns_B = columns[ENDED] > 0 if self.mask_truncated_completions else np.ones(len(size_B), bool)
        begin_B = np.where(learns_B, prompt_B, prompt_B + size_B)
        learned = [np.arange(m + n) >= begin for m, n, begin in zip(prompt_B, size_B, begin_B, strict=True)]
        ids = _by_sample(rows, [f"sample{g}_ids" for g in range(group)])
        batch = Batch.padded(np.concatenate(ids), np.concatenate(learned), prompt_B + size_B, pad, group)
        columns |= {START: prompt_B - 1, SAMPLED: np.zeros((len(ids), self.max_completion_length), np.float32)}
        for place, logprobs in enumerate(_by_sample(rows, [f"{SAMPLED}{g}" for g in range(group)])):
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
        sampled, greedy, referred, kl_B = answers
        reward, scored = _values(sampled, REWARD), _values(sampled, SCORED) > 0
        likely, likely_scored = _values(greedy, REWARD), _values(greedy, SCORED) > 0
        terms: TermSums = {
            "reward": (reward[scored].sum().item(), int(scored.sum())),
            "greedy": (likely[likely_scored].sum().item(), int(likely_scored.sum())),
        }
        for name, column in (("length", SIZE), ("ended", ENDED), ("failed", FAILED)):
            terms[name] = _values(sampled, column).sum().item(), len(reward)
        if referred is not None and kl_B is not None:
            both = scored & (_values(referred, SCORED) > 0)
            difference = reward[both] - _values(referred, REWARD)[both]
            terms["win"] = (np.sign(difference) + 1).sum().item() / 2, len(difference)
            terms["kl"] = kl_B.double().sum().item(), len(kl_B)
        return terms

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt, and the answer if the row has one."""
        if isinstance(row["prompt"], str):
            return row["prompt"], row.get("completion", "")
        return conversation_of(row["prompt"], row.get(OPTIONS)), ""


def _prompts(rows: pa.Table, tokenizer: Tokenizer) -> tuple[list[Any], list[list[int]]]:
    """Returns the prompts as rewards take them, text or turns, and their token ids."""
    if pa.types.is_nested(rows.schema.field("prompt").type):
        turns: list[Conversation] = conversations(rows, "prompt")
        ids = [rendered_ids(tokenizer, each.turns, each.options, add_generation_prompt=True) for each in turns]
        return [each.turns for each in turns], ids
    texts = rows["prompt"].to_pylist()
    ids = tokenizer(texts)["input_ids"] if texts else []
    return texts, [each or [tokenizer.eos_token_id] for each in ids]


def _by_sample(rows: pa.RecordBatch, names: list[str]) -> list[np.ndarray]:
    """Returns the lists of columns with one for each sample, the samples of a row one after another."""
    columns = [np.split(flattened(rows[name]), np.diff(rows[name].offsets).cumsum()[:-1]) for name in names]
    return [sample for row in zip(*columns, strict=True) for sample in row]


def _values(rows: pa.RecordBatch, name: str) -> np.ndarray:
    values: np.ndarray = rows[name].flatten().to_numpy()
    return values
