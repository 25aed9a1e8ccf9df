"""Sections model.peft: what is refused by itself, and what goes into PEFT's configuration."""

from typing import Any

import pytest

from engine.config.adapters import Lora, Oft, RankShare
from engine.messages.errors import RunError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base's weights, which all slots share"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base's weights"),
        ({"init_lora_weights": "eva"}, "'eva' is computed from clients' rows, which must not leave them: leave it out"),
        ({"init_lora_weights": "other"}, 'is not known here: leave it out, or set it to "gaussian"'),
        ({"init_lora_weights": False}, "starts with a product that is not zero"),
        ({"rank_pattern": {"q_proj": 0}}, "model.peft.rank_pattern.q_proj must be at least 1"),
        ({"layers_to_transform": (1,)}, "layers_to_transform goes with a list of names .*, not with 'all-linear'"),
        ({"targets": ()}, "model.peft.targets is empty"),
        ({"use_dora": True, "ranks": (RankShare(8, 1.0),)}, "model.peft.use_dora does not go with that"),
    ],
)
def test_options_that_clients_cannot_share_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        Lora(**options)


def test_peft_may_change_the_options_that_it_is_given() -> None:
    lora = Lora(rank_pattern={"q_proj": 2}, targets=("q_proj",))
    lora.options()["rank_pattern"]["experts"] = 4
    assert lora.rank_pattern == {"q_proj": 2} and lora.options()["target_modules"] == ["q_proj"]


def test_blocks_of_rotations_are_given_by_number_or_size() -> None:
    for wrong in ({"r": 2}, {"oft_block_size": 0}):
        with pytest.raises(RunError, match=r"needs r .* or oft_block_size above 0, and the other one at 0"):
            Oft(**wrong)
    assert Oft(r=2, oft_block_size=0).options()["r"] == 2
