"""Runs a federation on Ray: driver, slots, local training, evaluation, checkpoints."""

import os

# Before torch takes memory for the first time: large tensors then lie in large pages. To clear pages one by one costs
# more than to fill them: a copy of 100 MB took 53 ms, and takes 15.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
