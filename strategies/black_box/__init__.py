"""Rules whose clients only score candidates: discrete prompts, and evolution strategies on continuous ones."""
