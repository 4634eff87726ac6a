"""Tiny models, data and runs for training tests: a step takes milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tok1d.data.module import DrawnData, PhotoData
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.decoders.spectral import SpectralDecoder
from tok1d.tokenizers.encoders.spectral import SpectralEncoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.part import Quantizer
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.quantizers.kl import KL
from tok1d.tokenizers.quantizers.nested_vq import NestedVQ
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.averaging import EMA
from tok1d.training.callbacks import Throughput
from tok1d.training.checkpoints import SafeCheckpointIO, SaveOnStop
from tok1d.training.tasks import ReconstructionTask


def titok(quantizer: Quantizer, seed: int = 0) -> Tokenizer1D:
    """4 tokens for 16 × 16 pixels."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}
    parts = TiTokEncoder(4, quantizer.dim, **shape), quantizer, GridDecoder(4, quantizer.code_dim, **shape)
    return Tokenizer1D(*parts, TailDrop("uniform"), (16, 16), "tiny")


def fsq() -> Tokenizer1D:
    return titok(FSQ([8, 8, 8]))


def vq_ema() -> Tokenizer1D:
    """Restarts dead codes in the first steps already."""
    torch.manual_seed(1)
    return titok(VQ(64, 6, l2=True, ema=True, ema_decay=0.5, dead_code_threshold=0.5))


def kl() -> Tokenizer1D:
    return titok(KL(8))


def spectral() -> Tokenizer1D:
    """8 tokens for 32 × 32 pixels; the decoder takes windows."""
    torch.manual_seed(0)
    decoder = SpectralDecoder(8, 4, 8, (32, 32), widths=(8,) * 5, blocks=(1,) * 5, condition=8)
    encoder = SpectralEncoder(8, 4, 8, (32, 32))
    return Tokenizer1D(encoder, NestedVQ(8, 4, 16, 2), decoder, TailDrop("log_uniform"), (32, 32), "tiny-spectral")


class Recorder(lightning.Callback):
    """What each batch was and cost; stops the process at a batch, as a crash would."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at, self.batches, self.losses = crash_at, [], []

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.crash_at:
            raise RuntimeError("power cut")
        self.batches.append(batch["image"].double().sum().item())

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:  # a calibration has no loss
            self.losses.append(outputs["loss"].item())


@dataclass
class Done:
    """A finished run."""

    task: ReconstructionTask
    trainer: Any
    record: Recorder
    ema: EMA
    last: Path

    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.last, map_location="cpu", weights_only=True)


@dataclass
class Setup:
    """Everything a run is made of; ``run`` can be called once."""

    folder: Path
    task: ReconstructionTask
    data: PhotoData = field(default_factory=lambda: DrawnData(images=10, val_images=2, size=16, batch_size=4))
    steps: int = 6
    save_every: int = 2
    crash_at: int | None = None
    more: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, resume: Path | None = None) -> Done:
        record, ema = Recorder(self.crash_at), EMA(0.9)
        keep = ModelCheckpoint(self.folder, every_n_train_steps=self.save_every, save_last=True, monitor=None)
        options: dict[str, Any] = {"gradient_clip_val": 1.0, "limit_val_batches": 0, **self.options}
        trainer = lightning.Trainer(
            default_root_dir=self.folder,
            accelerator="cpu",
            devices=options.pop("devices", 1),
            use_distributed_sampler=False,
            max_steps=self.steps,
            callbacks=[ema, keep, Throughput(1), record, SaveOnStop(), *self.more],
            logger=options.pop("logger", False),
            plugins=[SafeCheckpointIO()],
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **options,
        )
        trainer.fit(self.task, datamodule=self.data, ckpt_path=resume, weights_only=True)
        return Done(self.task, trainer, record, ema, self.folder / "last.ckpt")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested checkpoints differ; times and file names aside."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {k for k in {*a, *b} if k not in ("seconds", "dirpath", "best_model_path", "last_model_path", "kth_best_model_path", "best_k_models")}
        return [d for k in sorted(keys, key=str) for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.shape == b.shape and torch.equal(a, b) else [path]
    return [] if a == b else [path]
