"""How much deepspeed may hold at once, in elements, where its defaults are for large devices."""

BUCKET = 5_000_000  # gradients that are reduced together: by default 5e8, which is 2 GB a rank
LIVE = 1_000_000  # weights kept gathered and fetched ahead under stage 3: by default nearly the whole model
