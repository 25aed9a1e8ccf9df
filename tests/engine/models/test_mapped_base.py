"""Products merged into the base: what the layers compute, whoever's weights they look at."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.config.adapters import Lora
from engine.config.sections import Model
from engine.models.export import export_files
from engine.models.trainable import Trainable

IDS_BT = torch.tensor([[5, 9, 11, 3, 7, 2]])


def logits(network: torch.nn.Module) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        return network(input_ids=IDS_BT).logits


def drawn(size: int, seed: int, scale: float) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def merged_delta_of(trainable: Trainable) -> torch.Tensor:
    return drawn(sum(o * i for o, i in trainable.layout.product_shapes), 1, 0.05)


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_an_adapters_product_in_the_base_is_that_adapter(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable], name: str
) -> None:
    adapted, based = make_trainable(bases[name]), make_trainable(bases[name])
    adapted.flat.data.copy_(adapted.initial + drawn(adapted.layout.size, 3, 0.1))
    pairs = list(adapted.layout.lora_pairs(adapted.flat.data))
    merged_delta = torch.cat([(pair.scale * pair.b_OR @ pair.a_RI).reshape(-1) for pair in pairs])
    plain = logits(based.network)
    merged = based.merge_weights(merged_delta.numpy())
    based.use_merged(torch.from_numpy(merged))
    torch.testing.assert_close(logits(based.network), logits(adapted.network), rtol=0, atol=2e-5)
    assert not torch.allclose(logits(based.network), plain, atol=1e-3)
    based.use_merged(None)
    assert torch.equal(logits(based.network), plain)


def test_merged_deltas_replace_each_other_and_do_not_pile_up(
    bases: dict[str, Path], make_trainable: Callable[..., Trainable]
) -> None:
    trainable = make_trainable(bases["tied"])
    merged_delta = merged_delta_of(trainable)
    once = trainable.merge_weights(merged_delta.numpy())
    trainable.use_merged(torch.from_numpy(trainable.merge_weights((3 * merged_delta).numpy())))
    assert (trainable.merge_weights(merged_delta.numpy()) == once).all()


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_base_products_and_adapter_are_exported_as_one_model(
    bases: dict[str, Path],
    make_trainable: Callable[..., Trainable],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
) -> None:
    trainable = make_trainable(bases[name])
    trainable.flat.data.copy_(trainable.initial + drawn(trainable.layout.size, 3, 0.1))
    trainable.use_merged(torch.from_numpy(trainable.merge_weights(merged_delta_of(trainable).numpy())))
    model = Model(base=str(bases[name]), peft=Lora(r=4, alpha=8))
    before = logits(trainable.network)
    for file, content in export_files(trainable, model, tokenizer, "card", merged=True).items():
        (tmp_path / file).write_bytes(content)
    assert torch.equal(logits(trainable.network), before)
    assert not list(tmp_path.glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=2e-5)
