"""Whole runs of adapters beside LoRA on real Ray: the same bits on other slots, and plain PEFT loads the result."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import experiments

ADAPTER = "adapter_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft", "lanes"),
    [
        ('{kind="ia3"}', 2),
        ('{kind="oft", oft_block_size=4}', 1),
        ('{kind="lora", r=2, use_dora=true, rank_pattern={q_proj=1}}', 2),
        ('{kind="vera", r=4}', 1),
        ('{kind="ln_tuning"}', 1),
        ('{kind="lora", r=2, bias="all", modules_to_save=["lm_head"]}', 1),
    ],
    ids=["ia3", "oft", "dora", "vera", "ln_tuning", "saved"],
)
def test_a_run_trains_the_kind_and_plain_peft_loads_it(
    ray_session, small_recipe, tiny_base, tmp_path, peft, lanes, full
):
    if "ia3" not in peft and not full:
        pytest.skip("one kind is run unless all are asked for")
    changes = ("rounds=2", f"model.peft={peft}", f"clients.lanes={lanes}", "train.optimizer.lr=0.01")
    run = experiments.run(small_recipe(*changes, "clients.slots=2"), out=tmp_path / "two")
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]
    if full:
        single = experiments.run(small_recipe(*changes, "clients.slots=1"), out=tmp_path / "one")
        assert (single.model / ADAPTER).read_bytes() == (run.model / ADAPTER).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(ids).logits
        assert not torch.equal(PeftModel.from_pretrained(base, run.model).eval()(ids).logits, before)
