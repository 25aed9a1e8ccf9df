"""The base is loaded once per node: four slots on it must not cost four bases."""

import sys

import pytest

from datasets_partition.store.build import build
from engine.scheduling import worker_kinds
from engine.scheduling.pool import Pool


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_slots_share_one_base(ray_session, small_recipe, slot_processes, tiny_base, tmp_path, full):
    count = 4 if full else 2
    (small, small_growth), (large, large_growth) = (
        grown(ray_session, small_recipe, slot_processes, tiny_base, tmp_path / str(layers), layers, count)
        for layers in (1, 6)
    )
    assert large - small > 100e6
    # What else a slot needs (tokenizer, adapter, libraries read late) is in both. One copy would be a slope of 1.
    slope = (large_growth - small_growth) / (large - small)
    assert slope < 1.5, f"{slope:.2f} bytes for a byte of the base in {count} slots"


def grown(ray_session, small_recipe, slot_processes, tiny_base, folder, layers, count):
    """A base's bytes, and by how much the slots' memory grows when they attach to it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    recipe = small_recipe(
        f"clients.slots={count}", f"model.base='{folder}'", 'model.peft={kind="lora", r=1, targets=["q_proj"]}'
    )
    data = recipe.data
    store = build(data.source, data.partition, data.splits, recipe.seed, data.cache)
    others, processes = slot_processes(), set()
    wait, before = worker_kinds.wait_for_places, 0

    def measured(actors, federation):
        nonlocal before, processes
        places = wait(actors, federation)
        processes = slot_processes() - others
        assert len(processes) == count
        before = proportional_memory(processes)
        return places

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_kinds, "wait_for_places", measured)
        slots = Pool.start(recipe, folder / "client_state", store)
    try:
        return slots.base_bytes, proportional_memory(processes) - before
    finally:
        slots.stop()


def proportional_memory(processes):
    """The proportional set size (PSS) in bytes: a page that several of them share counts once over all."""
    return sum(process.memory_full_info().pss for process in processes)
