"""Whole runs and dry runs of other families: a dense model, a mixture of experts, a state space; in full, each one."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import experiments
from experiments.preflight.dry import dry_run
from experiments.preflight.family_list import family_config, family_names
from experiments.preflight.shrunk_base import write_base
from experiments.preflight.shrunk_config import shrunk

KINDS = ("qwen3", "olmoe", "mamba")
SHORT = ("rounds=1", "cohort.size=3", "train.steps=2", "train.batch=2", "evaluate.every=0")
OTHERS = sorted(family_names().keys() - set(KINDS))


@pytest.fixture(scope="module")
def base_of(tiny_base, tmp_path_factory):
    """Makes the folder of a tiny model of a family, with the tokenizer of the tests."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def made(family):
        folder = tmp_path_factory.mktemp(family)
        write_base(shrunk(family_config(family), tokenizer), tokenizer, folder)
        return folder

    return made


def try_run(small_recipe, base, folder):
    """A run, whose adapter plain PEFT loads onto the plain base and which has learned something."""
    run = experiments.run(small_recipe(f"model.base={base}", "model.attention=eager", *SHORT), out=folder)
    assert run.losses["end"]["heldout"] != run.losses["round 0"]["heldout"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.model)
    with torch.no_grad():
        assert plain(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def try_dry(small_recipe, family, folder):
    """A dry run of the family's large bases, of which there is a configuration alone."""
    config = family_config(family)
    config.architectures = config.architectures or [type(AutoModelForCausalLM.from_config(shrunk_of(config))).__name__]
    config.save_pretrained(folder)
    result = dry_run(small_recipe(f"model.base={folder}", "model.attention=eager", *SHORT))
    assert [proof.name for proof in result.proofs if not proof.holds] == []


def shrunk_of(config):
    class Few:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return 8

    return shrunk(config, Few())


@pytest.mark.parametrize("family", KINDS)
def test_a_run_of_each_kind_of_model(ray_session, small_recipe, base_of, tmp_path, family):
    try_run(small_recipe, base_of(family), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_a_dry_run_of_each_kind_of_model(ray_session, small_recipe, tmp_path, full, family):
    if family != "mamba" and not full:
        pytest.skip("one dry run is tried unless all are asked for")
    try_dry(small_recipe, family, tmp_path / "large")


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_every_other_family_runs_and_is_tried_dry(ray_session, small_recipe, base_of, tmp_path, full, family):
    if not full:
        pytest.skip("three kinds of models are run unless all families are asked for")
    try_run(small_recipe, base_of(family), tmp_path / "run")
    try_dry(small_recipe, family, tmp_path / "large")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_gangs_have_the_buffers_that_belong_to_the_weights(ray_session, small_recipe, base_of, tmp_path, full, stage):
    """Each rank routes tokens by the bias of the experts' scores: without it they would go to others."""
    if not full:
        pytest.skip("two pairs of runs: that files hold the buffers is tried without gangs")
    base = base_of("deepseek_v3")
    network = AutoModelForCausalLM.from_pretrained(base)
    bias = next(buffer for name, buffer in network.named_buffers() if "e_score_correction_bias" in name)
    bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))  # the first of two groups of experts
    with torch.no_grad():
        for parameter in network.parameters():  # so that experts differ
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    network.save_pretrained(base, save_original_format=False)
    changes = [
        f"model.base={base}",
        "model.peft={kind='lora', targets=['q_b_proj', 'o_proj']}",
        "train.optimizer={kind='sgd', lr=0.3}",
    ]
    changes += ["cohort.size=2", "rounds=1", "clients.slots=1", "model.attention=eager"]
    plain, gang = (
        experiments.run(small_recipe(*changes, *more), out=tmp_path / name)
        for name, more in (("plain", []), ("gang", [f"clients.zero={{stage={stage}, ranks=2}}"]))
    )
    ours, theirs = (load_file(run.model / "adapter_model.safetensors") for run in (gang, plain))
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    moved = max(values.abs().max().item() for name, values in theirs.items() if "lora_B" in name)
    assert apart < 1e-3 * moved and moved > 1e-3
    assert gang.losses["end"] == pytest.approx(plain.losses["end"], abs=1e-5)
