"""Losses of training, small modules that work without a task."""

from tok1d.training.losses.base import ImageLoss, LatentLoss

__all__ = ["ImageLoss", "LatentLoss"]
