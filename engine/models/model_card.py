"""The model card of the exported model."""

import re
from typing import Any

from engine.config.federation import Federation
from engine.config.sections import Lora


def model_card(
    federation: Federation,
    losses: dict[str, dict[str, float]],
    store: dict[str, Any],
    *,
    merged: bool,
    spent: str | None = None,
) -> str:
    """Writes README.md of the model folder: the base, the training, the losses by split, and how to load the model.

    With `merged` the strategy has changed the base, so that the folder holds a whole model. `spent` is the privacy
    budget that the run has spent, in words.
    """
    model, train = federation.model, federation.train
    adapter = isinstance(model.peft, Lora) and not merged
    training = store["clients"] - store["unseen_clients"]
    revision = f" at revision `{model.revision}`" if model.revision else ""
    amount = f"{train.steps} steps" if train.steps is not None else f"{train.epochs} epochs"
    splits = {
        "heldout": "held-out rows of training clients",
        "unseen": "clients that never trained",
        "server": "rows of the server",
    }
    header = f"| loss, nats per token | {' | '.join(losses)} |\n|---{'|---' * len(losses)}|\n"
    lines = [
        f"| {text} | " + " | ".join(f"{column[s]:.4f}" if s in column else "" for column in losses.values()) + " |"
        for s, text in splits.items()
        if any(s in column for column in losses.values())
    ]
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    load = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{model.public_base}"{trust})\n'
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")  # .merge_and_unload() folds it into the base'
        if adapter
        else "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder"{trust})'
    )
    privacy = f"- Differential privacy: {spent}. The losses above are outside of it.\n" if spent else ""
    what = "A LoRA adapter for" if adapter else "A whole model: merged products and adapters on" if merged else "All of"
    return f"""---
base_model: {model.public_base}
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
tags: [fedpost, federated]
---
# {federation.name}

{what} `{model.public_base}`{revision}, trained by federated fine-tuning.

- Strategy `{federation.strategy!r}`, {federation.rounds} rounds, seed {federation.seed}.
- {federation.cohort.expected(training):g} of {training} clients a round, {amount} of batch {train.batch} each.
- Data: {_without_folders(store["source"])}.
{privacy}
{header}{chr(10).join(lines)}

```python
{load}
```

The base model's license holds for what is derived from it.
"""


def _without_folders(source: str) -> str:
    """A source as it is written in Python, with the last names of absolute paths alone."""
    return re.sub(r"(?<=['\"])(file://)?/([^'\"]*/)?", "", source)
