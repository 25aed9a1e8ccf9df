"""The GPU's benchmark: what can be seen of it without one."""

import pytest
import torch

from engine.config.adapters import Lora
from engine.config.sections import Model
from experiments.bench.harness import measure, write_llama
from experiments.bench.scenarios.bare_loop import flops_per_token


def test_operations_are_counted_as_by_hand(tmp_path):
    write_llama(tmp_path, (64, 96, 3, 2), of_bytes=True)
    vocabulary, length, r = 257, 16, 4
    layer, head = 4 * 64 * 64 + 3 * 64 * 96, 64 * vocabulary
    adapters = r * (4 * (64 + 64) + 3 * (64 + 96))
    attention = 4 * length * 64  # each token's scores with all others, and their use
    forward = 2 * (3 * (layer + adapters) + head) + 3 * attention
    # Inputs' gradients, but not those of the first layer's queries, keys and values; adapters have weights' as well.
    first = 3 * (64 * 64 + r * 64)
    backward = 2 * (3 * (layer + adapters) + head - first) + 2 * 3 * adapters + 2 * 3 * attention
    flops = flops_per_token(Model(base=str(tmp_path), peft=Lora(r=r, targets="all-linear")), length)
    assert flops == pytest.approx(forward + backward, rel=0.02)  # attention's kernels differ in what they do again


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(command):
    ended = command("bench", "gpu")
    assert ended.returncode == 2 and "needs a GPU that torch can use; without one, --small" in ended.stderr


@pytest.mark.slow
def test_a_small_run_has_the_promised_keys(ray_session, full):
    if not full:
        pytest.skip("a minute")
    assert {"lanes_speedup", "speedup_1x128", "mfu_1x128", "apart_1x128"} < set(measure("gpu", small=True))
