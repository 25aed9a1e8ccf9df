"""Training objectives. The union below is the registry: a new objective is one file and one entry here."""

from engine.objectives.cpo import Cpo, SimPo
from engine.objectives.distill import Distill
from engine.objectives.dpo import Dpo
from engine.objectives.kto import Kto
from engine.objectives.orpo import Orpo
from engine.objectives.reinforcement.grpo import Grpo
from engine.objectives.reinforcement.rloo import Rloo
from engine.objectives.reward import Reward
from engine.objectives.sft import Sft

Objectives = Sft | Dpo | Kto | Orpo | Cpo | SimPo | Reward | Distill | Grpo | Rloo
