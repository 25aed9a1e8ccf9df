"""Deepspeed's configuration. Imports no deepspeed, so that the command can plan a run's memory without it."""

from typing import Any

from engine.config.sections import Model, Zero

# Elements that deepspeed may hold at once. Its defaults are made for large devices.
BUCKET = 5_000_000  # of gradients that are reduced together; the default of 5e8 takes 2 GB a rank
LIVE = 1_000_000  # of weights kept gathered or prefetched under stage 3; the default is nearly the whole model


def ds_config(model: Model, zero: Zero) -> dict[str, Any]:
    """Makes deepspeed's configuration. The step loop counts steps, sets learning rates and clips, not deepspeed."""
    optimization: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "overlap_comm": False,
        "sub_group_size": 10**15,  # one group, so that the optimizer steps once, after all gradients
        "stage3_max_live_parameters": LIVE,
        "stage3_prefetch_bucket_size": LIVE,
        "stage3_max_reuse_distance": 0,
    }
    if zero.offload == "cpu":
        optimization["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # used for deepspeed's own counters alone
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step ends when the step loop calls the optimizer
        "zero_optimization": optimization,
        "gradient_clipping": 0.0,  # the default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": model.dtype == "bfloat16"},
    }
