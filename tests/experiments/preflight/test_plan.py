"""What a recipe takes, told from a configuration: counted as the model counts, and less where more ranks share."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.sections import Clients, Zero
from engine.messages.errors import RunError
from engine.models.base_model import map_base, read_base
from engine.models.deepspeed_config import BUCKET
from engine.models.trainable import Trainable
from experiments.config.recipe import load_recipe, to_toml
from experiments.preflight import plan
from experiments.preflight.families import tiny_base
from experiments.preflight.plan import GIB, SPARE, Sizes, counted, on_fullest, rank_need, sizes, slot_need, smallest

FOUND = Sizes(parameters=1000, trained=600, largest=100, itemsize=2, activations=8, logits=4)


@pytest.fixture(scope="module")
def tuned(small_recipe):
    return small_recipe("model.peft=none")


def test_parameters_are_those_of_the_model(small_recipe, tuned, tiny_base):
    whole = AutoModelForCausalLM.from_pretrained(tiny_base)
    counts = sizes(tuned.model, 48)
    assert counts.parameters == counts.trained == whole.num_parameters() and counts.itemsize == 4
    assert counts.largest == max(parameter.numel() for parameter in whole.parameters())
    adapted = sizes(small_recipe().model, 48)
    assert adapted.parameters - adapted.trained == whole.num_parameters()


def test_activations_grow_with_the_length_and_not_with_what_is_trained(tuned):
    short, long = sizes(tuned.model, 32), sizes(tuned.model, 64)
    assert 1.9 < long.activations / short.activations < 4.1
    assert long.logits == 2 * short.logits


def test_adapted_weights_of_experts_are_copied_once(small_recipe):
    """Beside its base, the backward pass keeps W + B A of all experts, however many rows a batch has."""
    with tiny_base("olmoe") as base:
        counts = sizes(base.model, 16)
        network = base.plain()
        wrapped = [p.numel() for name, p in network.named_parameters() if "mlp." in name]  # experts and routers
    assert counts.copies == 4 * sum(wrapped)
    need, without = (slot_need(each, small_recipe(), 0.0) for each in (counts, counts._replace(copies=0)))
    assert need.activations - without.activations == counts.copies


def test_each_stage_and_each_rank_takes_off(tuned):
    counts = sizes(tuned.model, 48)
    totals = [rank_need(counts, tuned, Zero(stage=stage, ranks=4), 0.0).total for stage in (1, 2)]
    assert totals[1] < totals[0]
    optimizer = [rank_need(counts, tuned, Zero(stage=1, ranks=ranks), 0.0).optimizer for ranks in (1, 2, 4)]
    assert optimizer == [8 * counts.trained / ranks for ranks in (1, 2, 4)]  # AdamW has two vectors of float32
    assert slot_need(counts, tuned, 0.0).optimizer == 8 * counts.trained


def test_the_smallest_gang_is_no_larger_than_it_must_be(tuned):
    counts = sizes(tuned.model, 48)
    assert smallest(counts, tuned, 100 * GIB, 0.0) == Zero(stage=1, ranks=1)
    assert smallest(counts, tuned, 1000.0, 0.0) is None
    single = rank_need(counts, tuned, Zero(stage=1, ranks=1), 0.0).total
    chosen = smallest(counts, tuned, single, 0.0)  # a tenth is kept spare
    assert (chosen is not None and chosen.ranks > 1) or chosen.stage > 1
    three = min(rank_need(counts, tuned, Zero(stage=stage, ranks=3), 0.0).total for stage in (1, 2, 3))
    assert smallest(counts, tuned, three / SPARE + 1, 0.0).ranks == 3


@pytest.mark.parametrize(("stage", "off"), [(1, 1200 * 4), (2, 1500 * 4), (3, 1500 * 4)])
def test_what_is_offloaded_is_on_no_gpu(small_recipe, stage, off):
    """Two ranks of 300 elements each: masters, two moments, a flat gradient, and deepspeed's if that is cut too."""
    zero = f"clients.zero={{stage={stage}, ranks=2, offload='cpu'}}"
    on_cpu, on_gpu = (small_recipe("model.peft=none", zero, f"clients.num_gpus={gpus}") for gpus in (0, 1))
    here, there = (rank_need(FOUND, recipe, recipe.clients.zero, 0.0) for recipe in (on_cpu, on_gpu))
    assert here == rank_need(FOUND, on_cpu, Zero(stage=stage, ranks=2), 0.0)
    assert here.total - there.total == off and there.optimizer == 0
    weights, gradients = {1: 2000, 2: 2000, 3: 1000}[stage], 2400 if stage == 1 else 0
    gathered = 2 * (100 + plan.LIVE) if stage == 3 else 0
    assert (there.weights, there.gradients) == (weights + gathered, gradients + 4 * min(BUCKET, 600))


GANG, MIXED = Zero(ranks=2), Zero(ranks=2, from_rows=9, gangs=2)


@pytest.mark.parametrize(
    ("clients", "devices", "slots"),
    [
        (Clients(slots=3), 1, (3, 0)),
        (Clients(slots=3, zero=GANG), 1, (0, 3)),
        (Clients(slots=3, zero=MIXED), 1, (3, 2)),
        (Clients(num_cpus=1.5), 2, (10, 0)),  # five on the eight CPUs of each
        (Clients(zero=GANG), 1, (0, 4)),
        (Clients(zero=MIXED), 1, (4, 2)),  # eight places without those of four ranks
        (Clients(num_gpus=0.25), 2, (8, 0)),
        (Clients(num_gpus=0.3), 1, (3, 0)),
        (Clients(num_gpus=2), 5, (2, 0)),
        (Clients(num_gpus=0.5, zero=GANG), 3, (0, 3)),
        (Clients(num_gpus=1, zero=MIXED), 7, (3, 2)),
        (Clients(slots=9, num_gpus=0.25), 1, (4, 0)),  # a run cuts them too
    ],
)
def test_slots_and_gangs_are_those_of_a_run(clients, devices, slots):
    assert counted(clients, devices, 8) == slots


@pytest.mark.parametrize(("zero", "wanted"), [(GANG, "a gang needs 2 ranks"), (MIXED, "2 gangs of 2 ranks and one")])
def test_gangs_that_no_device_is_left_for(zero, wanted):
    with pytest.raises(ValueError, match=f"{wanted}.*: lower clients.zero.*, or give more --devices"):
        counted(Clients(num_gpus=1, zero=zero), 1, 8)


@pytest.mark.parametrize(
    ("gpus", "plain", "ranks", "devices", "held"),
    [
        (0, 4, 0, 1, 4 * 50 - 3 * 20),  # the base of 20 bytes once
        (0, 4, 0, 3, 2 * 50 - 20),
        (0, 0, 2, 4, 60),  # a whole rank
        (0, 0, 6, 4, 2 * 60),
        (0, 3, 4, 1, 3 * 50 - 2 * 20 + 4 * 60),
        (0, 3, 2, 2, 50 + 2 * 60),
        (0.25, 2, 0, 4, 2 * 50 - 20),  # on one of them
        (0.25, 16, 0, 4, 4 * 50 - 3 * 20),
        (0.25, 9, 2, 4, 2 * 50 - 20 + 2 * 60),
        (1, 3, 4, 8, 60),
        (2, 3, 0, 8, 50),
    ],
)
def test_whole_processes_are_on_the_fullest_device(gpus, plain, ranks, devices, held):
    assert on_fullest(Clients(num_gpus=gpus), plain, ranks, devices, slot=50.0, rank=60.0, base=20.0) == held


def test_plain_slots_and_gangs_are_both_in_the_plan(small_recipe, monkeypatch, capsys):
    monkeypatch.setattr(plan, "process_bytes", lambda: (1.0 * GIB, 2.0 * GIB))
    recipe = small_recipe("clients.slots=3", "clients.zero={ranks=2, from_rows=9, gangs=2}")
    assert not plan.show_plan(recipe, 12.0, 1)  # three processes of a GiB and four of two
    said = capsys.readouterr().out
    assert "with 5 slots" in said and "and the base's" in said
    assert "11.0" in said.split("as the recipe is: ")[1]
    assert plan.show_plan(recipe, 14.0, 1)


def test_the_command_says_whether_it_fits(command, small_recipe, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(small_recipe()))
    tight = command("plan", path, "--device-gib", "0.1", COLUMNS="120")
    assert tight.returncode == 1 and "it does not fit" in tight.stdout and tight.stderr == ""
    assert "stage 3, 2 ranks" in tight.stdout and "no gang of up to 1,024 ranks fits" in tight.stdout
    monkeypatch.setattr(plan, "process_bytes", lambda: (1.0 * GIB, 2.0 * GIB))
    assert plan.show_plan(load_recipe(path), 64.0, 1)
    said = capsys.readouterr().out
    assert "it fits" in said and "smallest gang" in said


@pytest.mark.parametrize("kind", ["ia3", "vera", "ln_tuning", "oft"])
def test_every_kind_of_adapter_is_counted(small_recipe, kind):
    model = small_recipe(f"model.peft={kind}").model
    packed, buffer = read_base(model)
    trainable = Trainable(map_base(packed, torch.from_numpy(buffer)), model, 0)
    assert plan.sizes(model, 8).trained == trainable.layout.size


def test_adapters_that_the_rule_cannot_work_on_are_refused(small_recipe):
    changes = ("strategy=ffa", 'model.peft={kind="lora", targets=["embed_tokens"]}')
    with pytest.raises(RunError, match=r"something else is trained in model\.embed_tokens"):
        plan.show_plan(small_recipe(*changes), 64.0, 1)


@pytest.mark.parametrize(
    "quantize",
    [
        '{kind="bitsandbytes", load_in_4bit=true}',
        '{kind="bitsandbytes", load_in_4bit=true, bnb_4bit_use_double_quant=true}',
        '{kind="bitsandbytes", load_in_8bit=true}',
        '{kind="torchao"}',
    ],
)
def test_a_quantized_base_takes_as_much_as_is_planned(small_recipe, quantize):
    recipe = small_recipe(f"model.quantize={quantize}")
    pytest.importorskip(recipe.model.quantize.kind)
    packed, _ = read_base(recipe.model)
    counts, plain = sizes(recipe.model, 48), sizes(small_recipe().model, 48)
    planned = counts.itemsize * (counts.parameters - counts.trained)
    assert planned == pytest.approx(packed.nbytes, rel=0.05) and counts.trained == plain.trained
    assert planned < 0.8 * plain.itemsize * (plain.parameters - plain.trained)


def test_gangs_are_not_planned_for_a_quantized_base(small_recipe, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(plan, "process_bytes", lambda: (0.0, 0.0))  # a measurement, which takes seconds
    assert plan.show_plan(small_recipe('model.quantize={kind="bitsandbytes", load_in_4bit=true}'), 64.0, 1)
    said = capsys.readouterr().out
    assert "no gang takes a quantized base (model.quantize)" in said and "stage" not in said
