"""Training on several devices: who computes what, in which order, and what is sent.

Schedules and layouts need no torch; the other names load it when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.pipeline_schedule import (
    Action,
    PipelineSchedule,
    best_group_size,
    interleaved_schedule,
    layers_of_stages,
)
from herdkern.parallel.pipeline_simulation import PipelineDeadlock, Simulation, simulate

if TYPE_CHECKING:
    from herdkern.parallel.compose import ParallelModel
    from herdkern.parallel.context import ContextAttend, context_parallel_attention, parallelize_context
    from herdkern.parallel.context_plan import ContextPlan, Traffic, query_alignment
    from herdkern.parallel.pipeline import Pipeline
    from herdkern.parallel.pipeline_links import PipelineError
    from herdkern.parallel.pipeline_stages import Stage, stages_of_rank

__all__ = [
    "Action",
    "ContextAttend",
    "ContextPlan",
    "ParallelConfig",
    "ParallelModel",
    "Pipeline",
    "PipelineDeadlock",
    "PipelineError",
    "PipelineSchedule",
    "Simulation",
    "Stage",
    "Traffic",
    "best_group_size",
    "context_parallel_attention",
    "interleaved_schedule",
    "layers_of_stages",
    "parallelize_context",
    "query_alignment",
    "simulate",
    "stages_of_rank",
]

_HOMES = {
    "ParallelModel": "compose",
    "ContextAttend": "context",
    "ContextPlan": "context_plan",
    "context_parallel_attention": "context",
    "parallelize_context": "context",
    "query_alignment": "context_plan",
    "Traffic": "context_plan",
    "Pipeline": "pipeline",
    "PipelineError": "pipeline_links",
    "Stage": "pipeline_stages",
    "stages_of_rank": "pipeline_stages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
