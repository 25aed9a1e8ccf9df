"""Whole runs whose clients train in lanes: the same bits on any number of slots, and nearly those of single clients."""

import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

import experiments
from engine.messages.events import RoundDone, Started
from engine.records.checkpoint import load_checkpoint
from experiments.config.recipe import load_recipe

ADAPTER = "model/adapter_model.safetensors"
CHANGES = ("train.optimizer={kind='sgd', lr=0.3}", "rounds=3", "evaluate.every=0")  # Adam would make much of rounding


def weights(run):
    return load_file(run.folder / ADAPTER)


@pytest.fixture(scope="module")
def packed(ray_session, small_recipe, tmp_path_factory):
    """A finished run in two lanes, by two slots."""
    return experiments.run(
        small_recipe("clients.lanes=2", "clients.slots=2", *CHANGES), out=tmp_path_factory.mktemp("packed") / "run"
    )


def test_lanes_lead_to_what_single_clients_lead_to(packed, small_recipe, tmp_path):
    alone = experiments.run(small_recipe(*CHANGES), out=tmp_path / "alone")
    for name, values in weights(alone).items():
        np.testing.assert_allclose(weights(packed)[name], values, rtol=0, atol=1e-5)
    assert alone.losses["end"]["heldout"] == pytest.approx(packed.losses["end"]["heldout"], abs=1e-5)
    assert (alone.folder / ADAPTER).read_bytes() != (packed.folder / ADAPTER).read_bytes()


@pytest.mark.slow
def test_neither_slots_nor_a_death_change_a_bit_of_lanes(packed, small_recipe, slot_processes, tmp_path, full):
    if not full:
        pytest.skip("a quarter of a minute: other slots and deaths are tried without lanes")
    before, killed = slot_processes(), []

    def kill(event):
        if isinstance(event, RoundDone) and not killed:
            victim = next(iter(slot_processes() - before))
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim)

    run = experiments.run(
        small_recipe("clients.lanes=2", "clients.slots=1", *CHANGES), out=tmp_path / "run", on_event=kill
    )
    assert killed and (run.folder / ADAPTER).read_bytes() == (packed.folder / ADAPTER).read_bytes()


def test_auto_is_settled_once_and_honoured(small_recipe, tmp_path):
    """An interrupted run goes on with what was measured at its start, which the recipe in its folder names."""

    class Enough(Exception):
        pass

    lanes = []

    def stop(event):
        if isinstance(event, Started):
            lanes.append(event.lanes)
        if isinstance(event, RoundDone) and event.round == 2 and len(lanes) == 1:
            raise Enough

    recipe, folder = small_recipe("clients.lanes=auto", *CHANGES), tmp_path / "run"
    with pytest.raises(Enough):
        experiments.run(recipe, out=folder, on_event=stop)
    assert load_recipe(folder / "recipe.toml").clients.lanes == lanes[0] >= 1
    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.lanes == lanes[0]
    experiments.run(recipe, out=folder, resume=True, on_event=stop)
    assert lanes[0] == lanes[1] and load_recipe(folder / "recipe.toml").clients.lanes == lanes[0]


def test_a_model_that_does_not_pack_is_refused_at_the_start(ray_session, small_recipe, tmp_path):
    recipe = small_recipe("clients.lanes=2", "model.peft={kind='lora', r=4, targets=['embed_tokens', 'q_proj']}")
    with pytest.raises(ValueError, match=r"clients\.lanes works with adapters of linear layers alone"):
        experiments.run(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.peft=none", 'model.peft.kind = "none"'),
        ('privacy.dp={kind="example", noise_multiplier=1.0, clip=1.0}', 'privacy.dp.kind = "example"'),
        ("clients.availability.deadline_s=5", "deadline_s"),
        ("clients.zero={ranks=2}", "clients.zero without from_rows"),
    ],
)
def test_what_does_not_pack_is_refused(small_recipe, change, named):
    assert small_recipe("clients.lanes=auto", change).clients.lanes == "auto"  # which then comes to 1
    with pytest.raises(ValueError, match=rf"{named}.*does not work with several lanes.*set clients.lanes = 1"):
        small_recipe("clients.lanes=4", change)
