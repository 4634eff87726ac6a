"""Training tasks, one class for each recipe. A task is a straight-line step; models and losses work without it."""

from tok1d.training.tasks.base import TokenizerTask
from tok1d.training.tasks.reconstruction import ReconstructionTask

__all__ = ["ReconstructionTask", "TokenizerTask"]
