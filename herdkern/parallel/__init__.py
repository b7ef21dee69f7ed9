"""Training on several devices: who computes what, in which order, and what is sent."""

from herdkern.parallel.pipeline_schedule import (
    Action,
    PipelineSchedule,
    best_group_size,
    interleaved_schedule,
    layers_of_stages,
)
from herdkern.parallel.pipeline_simulation import PipelineDeadlock, Simulation, simulate

__all__ = [
    "Action",
    "PipelineDeadlock",
    "PipelineSchedule",
    "Simulation",
    "best_group_size",
    "interleaved_schedule",
    "layers_of_stages",
    "simulate",
]
