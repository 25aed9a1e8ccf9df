"""Rollouts: tokens that depend on their own sequence alone, sampled with a cache as without one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.objectives.sampling import Sampling
from engine.training.rollouts import Rollouts, by_gumbel, by_inversion, cached_forward, complete, philox
from strategies.core.seeds import keyed_rng, sample_key

TINY = Path(__file__).resolve().parents[3] / "experiments" / "models" / "tiny"
CPU = torch.device("cpu")
TEXTS = [
    '"""Return',
    "def area(width, height):",
    "import numpy as np\n\n",
    "class Point:\n    def __init__(self, x, y):\n",
    "for",
    "    return x +",
    "# the",
    "raise ValueError(",
]


@pytest.fixture(scope="module")
def network():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    return [np.array(ids) for ids in AutoTokenizer.from_pretrained(TINY)(TEXTS)["input_ids"]]


def keys_of(prompts: int, samples: int) -> list[bytes]:
    return [sample_key(7, 0, 3, 0, row, sample) for row in range(prompts) for sample in range(samples)]


def sampled(network, prompts, keys, samples=4, tokens=6, temperature=1.0, ends=frozenset()) -> Rollouts:
    sampling = Sampling(samples, tokens, temperature)
    return complete(cached_forward(network), prompts, keys, sampling, ends=ends, pad=1, device=CPU)


@torch.no_grad()
def without_cache(network, prompt, key, tokens, temperature):
    """One sequence by itself, the whole text through the network for each token, and numpy's arithmetic."""
    ids, logprobs, uniforms = [*map(int, prompt)], [], keyed_rng(key).random(tokens)
    for uniform in uniforms:
        logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy() / temperature
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        ids.append(int(np.searchsorted(np.cumsum(chances), uniform, side="right")))
        logprobs.append(np.log(chances[ids[-1]]))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_equals_a_loop_without_cache(network, prompts, temperature):
    keys = keys_of(len(prompts), 2)
    ours = sampled(network, prompts, keys, samples=2, temperature=temperature)
    assert ours.lengths_B.tolist() == [6] * 16 and not ours.ended_B.any()
    for place, key in enumerate(keys):
        ids, logprobs = without_cache(network, prompts[place // 2], key, 6, temperature)
        assert ours.ids_BC[place].tolist() == ids
        np.testing.assert_allclose(ours.logprobs_BC[place].numpy(), logprobs, atol=2e-4)


def test_a_sequence_is_the_same_in_batches_of_1_4_and_32(network, prompts):
    keys = keys_of(8, 4)
    together = sampled(network, prompts, keys)
    assert len({tuple(row) for row in together.ids_BC.tolist()}) == 32
    by_prompt = [sampled(network, [prompts[i]], keys[4 * i : 4 * i + 4]) for i in range(8)]
    alone = [sampled(network, [prompts[i // 4]], [keys[i]], samples=1) for i in range(32)]
    for parts in (by_prompt, alone):
        assert torch.equal(torch.cat([part.ids_BC for part in parts]), together.ids_BC)
        torch.testing.assert_close(torch.cat([part.logprobs_BC for part in parts]), together.logprobs_BC)


def test_greedy_equals_transformers_generate(network, prompts):
    ours = sampled(network, prompts, keys_of(8, 1), samples=1, tokens=8, temperature=0.0)
    for prompt, ids, logprobs in zip(prompts, ours.ids_BC, ours.logprobs_BC, strict=True):
        given = torch.from_numpy(prompt)[None]
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        out = network.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)
        assert ids.tolist() == out[0, len(prompt) :].tolist()
        with torch.no_grad():
            log_chances = network(input_ids=out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logprobs, log_chances.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-4)


def test_an_end_token_ends_a_completion_and_nothing_else(network, prompts):
    keys = keys_of(8, 4)
    free = sampled(network, prompts, keys)
    ends = frozenset(free.ids_BC[:6, 2].tolist())  # some sequences end here, others elsewhere or never
    ended = sampled(network, prompts, keys, ends=ends)
    assert 6 <= int(ended.ended_B.sum()) < 32
    for place in range(32):
        tokens = free.ids_BC[place].tolist()
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), 6)
        assert ended.lengths_B[place] == length
        assert bool(ended.ended_B[place]) == any(token in ends for token in tokens)
        assert ended.ids_BC[place].tolist() == tokens[:length] + [1] * (6 - length)
        assert (ended.logprobs_BC[place, length:] == 0).all()
        torch.testing.assert_close(ended.logprobs_BC[place, :length], free.logprobs_BC[place, :length])
    everything = sampled(network, prompts, keys, ends=frozenset(range(4096)))
    assert everything.ids_BC.shape == (32, 1) and everything.ended_B.all()


def test_an_empty_prompt_only_fills_its_place(network, prompts):
    keys = keys_of(3, 2)
    filled = sampled(network, [prompts[0], np.array([], int), prompts[2]], keys, samples=2)
    assert filled.lengths_B.tolist() == [6, 6, 0, 0, 6, 6] and not filled.ended_B.any()
    assert (filled.ids_BC[2:4] == 1).all() and (filled.logprobs_BC[2:4] == 0).all()
    alone = sampled(network, [prompts[2]], keys[4:], samples=2)
    assert torch.equal(filled.ids_BC[4:], alone.ids_BC)


def test_no_generator_of_the_process_is_used(network, prompts):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sampled(network, prompts, keys_of(8, 4))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_inversion_by_hand():
    chances = torch.tensor([0.5, 0.25, 0.0, 0.25, 0.0], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    chosen, logprobs = by_inversion(chances.log().expand(6, -1), uniforms)
    assert chosen.tolist() == [0, 0, 1, 1, 3, 3]
    torch.testing.assert_close(logprobs, chances[chosen].log())


# The known answers of the authors' library Random123 (kat_vectors, philox4x32-10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_authors_numbers(counter, key, expected):
    words = philox([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert [int(word) for word in words] == expected


def test_gumbel_max_draws_by_the_probabilities_and_by_the_key_alone():
    chances = torch.tensor([0.4, 0.1, 0.05, 0.2, 0.25, 0.0], dtype=torch.float64)
    keys = [np.frombuffer(sample_key(1, 0, 0, 0, 0, sample)[:16], "<u4") for sample in range(8000)]
    key_B4 = torch.from_numpy(np.stack(keys).astype(np.int64))
    chosen, logprobs = by_gumbel(chances.log().expand(8000, -1), key_B4, 3)
    shares = torch.bincount(chosen, minlength=6) / 8000
    torch.testing.assert_close(shares.double(), chances, rtol=0, atol=0.02)  # four standard deviations
    torch.testing.assert_close(logprobs, chances[chosen].log())
    few, _ = by_gumbel(chances.log().expand(5, -1), key_B4[10:15], 3)
    assert torch.equal(few, chosen[10:15])
    other, _ = by_gumbel(chances.log().expand(8000, -1), key_B4, 4)
    assert 0.6 < (other != chosen).double().mean() < 0.8  # independent: 1 - sum of squares is 0.725
