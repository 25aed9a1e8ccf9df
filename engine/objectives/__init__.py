"""Training objectives. The union below is the registry: a new objective is one file and one entry here."""

from engine.objectives.dpo import Dpo
from engine.objectives.sft import Sft

Objectives = Sft | Dpo
