"""Emulators: which layers they have, what alignment gains, and that all layers make the base itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config.access import Access
from engine.config.ends import Ends
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import map_base, pack, read_base
from engine.models.ends import align, decoder_layers, emulator_of, emulator_skeleton, kept_layers
from engine.models.export import ends_files
from engine.models.trainable import Trainable
from engine.objectives.sft import Sft
from engine.training.local_training import LocalTrainer
from engine.training.rollouts import own_samples
from engine.training.step_loop import Training
from strategies.core.layout import Layout
from strategies.core.seeds import rng


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    """A base of eight layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("deep")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def network_of(model):
    packed, buffer = read_base(model)
    return map_base(packed, torch.from_numpy(buffer)).eval()


def ends_of(base, **options):
    return Model(base=str(base), peft=Ends(**options))


def test_layers_are_evenly_spaced():
    def kept(layers, **options):
        return kept_layers(ends_of("x", **options), layers)

    # OPT-1.3b of the paper: 2 + 8 of 20 + 2.
    assert kept(24, first=2, last=2, middle=8) == [0, 1, 2, 5, 7, 10, 13, 16, 18, 21, 22, 23]
    assert kept(8, first=1, last=1, middle=2) == [0, 1, 6, 7]
    assert kept(4, middle="all") == [0, 1, 2, 3]
    with pytest.raises(RunError, match="is 4, and 'x' has 3 layers"):
        kept(3)
    with pytest.raises(RunError, match="set it to 2"):
        Ends(middle=1)


@pytest.mark.parametrize("base", ["tied", "gpt2"])
def test_an_emulator_of_the_whole_middle_is_the_base_to_the_bit(bases, base, rows):
    model = ends_of(bases[base], middle="all")
    network = network_of(model)
    small = emulator_of(network, model)
    batch = Sft().collate(rows, 0)
    with torch.no_grad():
        ours, theirs = (
            each(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits for each in (small, network)
        )
    assert torch.equal(ours, theirs)


def test_an_emulator_lacks_the_layers_between_and_fits_the_same_vector(deep, rows):
    model = ends_of(deep, middle=2)
    network = network_of(model)
    small = emulator_of(network, model)
    assert len(decoder_layers(small)[1]) == 4
    packed, buffer = pack(small, replace(model, base="base-model owner"))
    emulator = Trainable(map_base(packed, torch.from_numpy(buffer)), model, 3)
    whole = Trainable(network_of(model), model, 3)
    assert torch.equal(emulator.initial, whole.initial)
    sizes = [layout.shapes for layout in (emulator.layout, whole.layout)]
    assert sizes[0] == sizes[1] and isinstance(whole.layout, Layout)
    assert whole.layout.names[-1].startswith("model.layers.7.") and emulator.layout.names[-1].startswith(
        "model.layers.3."
    )
    # What is packed for clients has nothing of the layers that they lack.
    for sealed in (3, 4):
        matrices = [tensor for tensor in decoder_layers(network)[1][sealed].parameters() if tensor.ndim == 2]
        assert matrices and not any(matrix.numpy().tobytes()[:64] in buffer.tobytes() for matrix in matrices)


def test_alignment_brings_the_emulator_closer_to_the_base(deep, tokenizer):
    model = ends_of(deep, middle=2, align_steps=20, align_lr=1e-3)
    network = network_of(model)
    batches = own_samples(network, tokenizer, 5, torch.device("cpu"))
    again = own_samples(network, tokenizer, 5, torch.device("cpu"))
    assert torch.equal(batches(3).ids_BT, again(3).ids_BT) and not torch.equal(batches(0).ids_BT, batches(1).ids_BT)

    def apart(small):
        batch = batches(7)
        with torch.no_grad():
            ours, theirs = (each(input_ids=batch.ids_BT).logits for each in (small, network))
        return float((ours - theirs).square().mean())

    small = emulator_of(network, model)
    before = apart(small)
    ends = [tensor.clone() for layer in (0, 3) for tensor in decoder_layers(small)[1][layer].parameters()]
    align(small, network, model, batches)
    after = [tensor for layer in (0, 3) for tensor in decoder_layers(small)[1][layer].parameters()]
    assert apart(small) < 0.9 * before
    assert all(torch.equal(old, new) for old, new in zip(ends, after, strict=True))
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_ends_alone_are_exported_where_the_base_is_not_given(deep, tokenizer, tmp_path):
    from safetensors.torch import load_file

    model = replace(ends_of(deep), access=Access(level="emulator"))
    whole = Trainable(network_of(model), model, 3)
    whole.flat.data.add_(1.0)
    for name, content in ends_files(whole, tokenizer, "card").items():
        (tmp_path / name).write_bytes(content)
    ends = load_file(tmp_path / "ends.safetensors")
    assert {name.split(".")[2] for name in ends} == {"0", "7"}
    assert not list(tmp_path.glob("model*.safetensors"))
    plain = network_of(model)
    _, unexpected = plain.load_state_dict(ends, strict=False)
    assert not unexpected and torch.equal(
        plain.model.layers[7].mlp.up_proj.weight, whole.network.model.layers[7].mlp.up_proj.weight
    )


def test_the_plan_counts_the_emulator(deep):
    small, whole = emulator_skeleton(ends_of(deep, middle=2)), network_of(ends_of(deep))
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (small, whole)]
    assert counts[0] < counts[1]


def test_training_on_the_emulator_helps_the_base(deep, rows, federation):
    """A smoke test of the whole idea: the ends learn beside the emulator, and the base with them has a lower loss."""
    model = ends_of(deep, middle=2)
    network = network_of(model)
    emulator = LocalTrainer(Trainable(emulator_of(network, model), model, 3), 0, federation.train)
    whole = LocalTrainer(Trainable(network_of(model), model, 3), 0, federation.train)
    before = whole.loss_terms(rows, 8)["nll"][0]
    train = replace(federation.train, steps=20)
    start = emulator.trainable.initial
    (result,) = emulator.train([Training(rows, start, rng(0, 0, 0, "batches"), 0)], train)
    whole.become(result.end)
    assert whole.loss_terms(rows, 8)["nll"][0] < 0.98 * before
    assert np.isfinite(result.metrics["loss"])
