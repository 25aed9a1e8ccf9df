"""A start's vector is what the adapter's folder holds, and one that does not fit is refused in a sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.adapters import FullTuning, Lora
from engine.config.federation import Federation
from engine.config.sections import Model
from engine.config.train import Sgd
from engine.models.base_model import map_base, read_base
from engine.models.start import adapter_start, begun
from engine.models.trainable import Trainable
from strategies.core.layout import Layout
from strategies.core.sharding import Partition
from strategies.lora.frozen_half import FedSb, FfaLora

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def trained(make_trainable: Callable[..., Trainable], bases: dict[str, Path], tmp_path: Path) -> Trainable:
    """A Trainable with an adapter (r = 4, alpha = 8) that is not zero; PEFT has saved it in `start`."""
    trainable = make_trainable(bases["tied"])
    with torch.no_grad():
        trainable.flat.normal_(generator=torch.Generator().manual_seed(1))
    trainable.network.save_pretrained(tmp_path / "start")
    return trainable


def model(tmp_path: Path, **peft: Any) -> Model:
    return Model(start=str(tmp_path / "start"), peft=Lora(**{"r": 4, "alpha": 8, **peft}))


def test_the_vector_is_the_one_that_peft_has_saved(trained: Trainable, tmp_path: Path) -> None:
    vector = adapter_start(model(tmp_path), trained.layout)
    assert vector is not None and torch.equal(vector, trained.flat.detach())
    assert adapter_start(Model(), trained.layout) is None


@pytest.mark.parametrize("make", [Partition.by_tensor, lambda layout, ranks: Partition.contiguous(layout.size, ranks)])
def test_shards_are_parts_of_the_vector(trained: Trainable, tmp_path: Path, make: Callable[..., Partition]) -> None:
    partition = make(trained.layout, 3)
    for rank, part in enumerate(partition.intervals):
        shard = adapter_start(model(tmp_path), trained.layout, part)
        assert shard is not None and torch.equal(shard, partition.cut(trained.flat.detach(), rank))


def changed(tmp_path: Path, **keys: Any) -> None:
    file = tmp_path / "start" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            {"lora_alpha": 16},
            r"scales its product by 4 \(alpha = 16 at rank 4\), and the recipe's by 2: set model\.peft",
        ),
        (
            {"use_rslora": True},
            r"was made with use_rslora = True, and the recipe's has None: set model\.peft\.use_rslora",
        ),
        ({"alpha_pattern": {"q_proj": 4}}, r"was made with alpha_pattern = {'q_proj': 4}, and the recipe's has None"),
        ({"peft_type": "IA3"}, r"is of kind 'ia3', and the recipe's of 'lora': set model\.peft\.kind"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "was begun with init_lora_weights = 'pissa_niter_4', which changes the",
        ),
        ({"r": None}, r"adapter_config\.json \(model\.start\) is not that of an adapter \(TypeError"),
    ],
)
def test_an_adapter_with_another_factor_is_refused(
    trained: Trainable, tmp_path: Path, keys: dict[str, Any], complaint: str
) -> None:
    changed(tmp_path, **keys)
    with pytest.raises(ValueError, match=complaint):
        adapter_start(model(tmp_path), trained.layout)


def test_an_adapter_of_other_layers_or_of_another_rank_is_refused(
    trained: Trainable, tmp_path: Path, make_trainable: Callable[..., Trainable], bases: dict[str, Path]
) -> None:
    fewer = make_trainable(bases["tied"], Lora(r=4, alpha=8, targets=("q_proj",))).layout
    with pytest.raises(ValueError, match=r"does not train its \S+down_proj\S+: set model\.peft\.targets"):
        adapter_start(model(tmp_path), fewer)
    smaller = make_trainable(bases["tied"], Lora(r=2, alpha=4)).layout
    with pytest.raises(ValueError, match=r"has the shape \[4, 32\], and the recipe's \[2, 32\]; set model\.peft\.r to"):
        adapter_start(model(tmp_path), smaller)
    wider = Layout((*trained.layout.names, "new.lora_A.default.weight"), (*trained.layout.shapes, (4, 8)), 2.0)
    with pytest.raises(ValueError, match=r"it has no new\.lora_A\.weight; set model\.peft\.targets to the layers"):
        adapter_start(model(tmp_path), wider)


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "cannot be read"), (b"pickled", "cannot be read"), (float("nan"), "not finite")]
)
def test_an_adapter_that_is_not_whole_is_refused(
    trained: Trainable, tmp_path: Path, content: bytes | float | None, complaint: str
) -> None:
    file = tmp_path / "start" / TENSORS
    if isinstance(content, float):
        tensors = load_file(file)
        next(iter(tensors.values()))[0] = content
        save_file(tensors, file)
    else:
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors \(model\.start\) .*{complaint}"):
        adapter_start(model(tmp_path), trained.layout)


def test_full_tuning_reads_the_starts_weights(bases: dict[str, Path], make_trainable: Callable[..., Trainable]) -> None:
    settings = Model(base=str(bases["tied"]), start=str(bases["untied"]), peft=FullTuning())
    packed, buffer = read_base(settings)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), settings, 3)
    assert adapter_start(settings, trainable.layout) is None
    assert torch.equal(trainable.initial, make_trainable(bases["untied"], FullTuning()).initial)


def test_a_rule_that_begins_with_fresh_adapters_refuses_a_start(federation: Federation, tmp_path: Path) -> None:
    train = replace(federation.train, optimizer=Sgd(lr=0.1))
    begun = replace(federation, model=model(tmp_path), train=train, strategy=FfaLora())
    with pytest.raises(ValueError, match=r"'fedsb' makes its bases of what round 0 adds .* leave model\.start out"):
        replace(begun, strategy=FedSb())


def test_a_head_of_scores_is_read_or_new(trained: Trainable, bases: dict[str, Path], tmp_path: Path) -> None:
    """The adapter of a language model has none; a reward model's goes to reward models alone."""
    settings = Model(base=str(bases["tied"]), peft=Lora(r=4, alpha=8))
    packed, buffer = read_base(settings, scores=True)
    scoring = Trainable(map_base(packed, torch.from_numpy(buffer)), settings, 3)
    start = adapter_start(model(tmp_path), scoring.layout)
    assert start is not None and start[-32:].isnan().all() and torch.equal(start[:-32], trained.flat.detach())
    vector = begun(start, scoring.initial)
    assert torch.equal(vector, torch.cat([trained.flat.detach(), scoring.initial[-32:]]))
    scoring.network.save_pretrained(tmp_path / "start")
    again = adapter_start(model(tmp_path), scoring.layout)
    assert again is not None and torch.equal(begun(again, torch.zeros_like(again)), scoring.flat.detach())
    with pytest.raises(ValueError, match=r"is that of a reward model, which scores texts: set train\.objective"):
        adapter_start(model(tmp_path), trained.layout)
