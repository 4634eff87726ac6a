"""Training tasks, one class for each recipe. A task is a straight-line step; models and losses work without it."""

from tok1d.training.tasks.base import TokenizerTask
from tok1d.training.tasks.calibrate import CalibrationTask
from tok1d.training.tasks.flow import FlowTask
from tok1d.training.tasks.reconstruction import ReconstructionTask

__all__ = ["CalibrationTask", "FlowTask", "ReconstructionTask", "TokenizerTask"]
