"""Training tasks, one class for each recipe. A task is a straight-line step; models and losses work without it."""

from tok1d.training.tasks.adversarial import AdversarialTask
from tok1d.training.tasks.base import TokenizerTask
from tok1d.training.tasks.binary import BinaryTask
from tok1d.training.tasks.calibrate import CalibrationTask
from tok1d.training.tasks.flow import FlowTask
from tok1d.training.tasks.generator import GeneratorTask
from tok1d.training.tasks.halting import HaltingTask
from tok1d.training.tasks.proxy import DecoderTask, ProxyCodeTask
from tok1d.training.tasks.reconstruction import ReconstructionTask
from tok1d.training.tasks.step import TrainingTask
from tok1d.training.tasks.text import TextTask

__all__ = [
    "AdversarialTask", "BinaryTask", "CalibrationTask", "DecoderTask", "FlowTask", "GeneratorTask", "HaltingTask",
    "ProxyCodeTask", "ReconstructionTask", "TextTask", "TokenizerTask", "TrainingTask",
]  # fmt: skip
