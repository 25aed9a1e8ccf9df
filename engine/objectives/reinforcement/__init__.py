"""Reinforcement: rewards, what they make of sampled completions, and the objectives that learn from them."""
