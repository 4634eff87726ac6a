"""The two stages of TiTok and One-D-Piece: name the codes of a frozen VQGAN, then fine-tune the decoder on pixels.

Stage 1 (:class:`ProxyCodeTask`) needs no perceptual and no adversarial loss: the decoder only says, for each patch, which code a
MaskGIT-VQGAN gives it ("proxy codes"). Stage 2 (:class:`DecoderTask`) puts that VQGAN's decoder behind it and trains on pixels
with encoder and codes fixed. Paper: https://arxiv.org/abs/2406.07550, section 3.

Shapes: B images, N tokens, n ≤ N kept tokens, P patches, K proxy codes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.official.titok_legacy import ProxyCodeDecoder, add_pixels
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import ImageLoss, LatentLoss
from tok1d.training.start import PARTS, copy_weights, load_named
from tok1d.training.tasks.adversarial import AdversarialTask
from tok1d.training.tasks.base import TokenizerTask
from tok1d.training.tasks.coding import quantize

log = logging.getLogger(__name__)


class ProxyCodeTask(TokenizerTask):
    """Stage 1: cross entropy of the decoder's logits with the codes of a frozen tokenizer.

    Args:
        tokenizer: with a :class:`tok1d.tokenizers.official.titok_legacy.ProxyCodeDecoder` without pixel decoder.
        teacher: the frozen tokenizer: whatever ``tok1d.load`` takes. Its codes are read from the batch (``codes``) where the data
            has them cached, else made of the images in every step.
        init_from, losses, lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, compile, compile_backend, seed,
            starts: see :class:`tok1d.training.tasks.base.TokenizerTask`; ``losses`` are those of latents.
        weights: as there; ``cross_entropy`` is 1 unless given.

    A validation says ``psnr`` of the pictures that the teacher paints of the likeliest codes, ``cross_entropy`` and ``accuracy``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D,
        teacher: str = "maskgit-vqgan",
        init_from: str | None = None,
        losses: dict[str, ImageLoss | LatentLoss] | None = None,
        weights: dict[str, float] | None = None,
        lr: float = 1e-4,
        warmup_steps: int = 10_000,
        final_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        val_tokens: list[int] | None = None,
        compile: list[str] | None = None,
        compile_backend: str = "inductor",
        seed: int = 0,
        starts: dict[str, int] | None = None,
    ) -> None:
        decoder = tokenizer.decoder
        if not isinstance(decoder, ProxyCodeDecoder) or decoder.pixels is not None:
            raise UsageError(
                f"stage 1 trains a ProxyCodeDecoder with pixels: false, got {type(decoder).__name__} with pixels: "
                f"{decoder.config.get('pixels')}. Pixels are trained by DecoderTask (stage 2), other decoders by AdversarialTask"
            )
        super().__init__(
            tokenizer, init_from, losses, {"cross_entropy": 1.0, **(weights or {})}, lr, warmup_steps, final_lr, betas,
            weight_decay, val_tokens, 1, compile, compile_backend, seed, starts,
        )  # fmt: skip
        self.frozen = Frozen(teacher=_teacher(teacher, decoder))

    @property
    def teacher(self) -> Tokenizer1D:
        return self.frozen.on(self.device)["teacher"]

    def losses_of(self, batch: dict[str, Any], lengths: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        coded = quantize(self.tokenizer, self.tokenizer.encoder(batch["image"]), lengths)
        logits = self.tokenizer.decoder.logits(coded.q, coded.given)  # (B, P, K)
        found, accuracy = self.compare(logits, self.proxies(batch))
        output = coded.output
        return {**found, **output.losses, **self.latent_losses(output, batch)}, {**output.stats, **accuracy}

    @torch.no_grad()
    def proxies(self, batch: dict[str, Any]) -> Tensor:
        """int64 (B, P) codes of the teacher for exactly these views: cached ones, or made here.

        Raises:
            ModelError: cached codes that are not the teacher's.
        """
        codes = batch.get("codes")
        if codes is None:
            teacher = self.teacher
            with torch.autocast(self.device.type, enabled=False):  # near codes would be confused
                return teacher.quantizer.codes_to_ids(teacher.encode_latents(batch["image"]))
        shape = (len(batch["image"]), self.teacher.max_tokens)
        if tuple(codes.shape) != shape:
            raise ModelError(f"cached codes must be {shape} = (images, codes of the teacher), got {tuple(codes.shape)}; cache them with this teacher")
        return codes.long()

    def compare(self, logits: Tensor, proxies: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Float (B, P, K), int64 (B, P) → ``cross_entropy`` in nats, and the share of patches whose likeliest code is right."""
        loss = F.cross_entropy(logits.flatten(0, 1).float(), proxies.flatten())
        return {"cross_entropy": loss}, {"accuracy": (logits.detach().argmax(-1) == proxies).float().mean()}

    def pictures(self, q: Tensor, batch: dict[str, Any]) -> Tensor:
        """The teacher's pictures of the likeliest codes, float (B, 3, H, W)."""
        codes = self.tokenizer.decoder.logits(q.to(self.tokenizer.dtype)).argmax(-1)
        return self.teacher.decode_latents(self.teacher.quantizer.ids_to_codes(codes))

    def code_scores(self, q: Tensor, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        loss, accuracy = self.compare(self.tokenizer.decoder.logits(q.to(self.tokenizer.dtype)), self.proxies(batch))
        return {**loss, **accuracy}


class DecoderTask(AdversarialTask):
    """Stage 2: train the decoder of a finished tokenizer on pixels; encoder and quantizer stay as they are, to the bit.

    Args:
        tokenizer: what to train; encoder and quantizer those of ``init_from``.
        init_from: the trained tokenizer: whatever ``tok1d.load`` takes. Its decoder is the start where it is of the same class, else
            the decoder starts untrained.
        teacher: of a stage-1 tokenizer without pixel decoder: the frozen tokenizer it named the codes of, whose decoder and
            codebook become its pixel decoder. Whatever ``tok1d.load`` takes.
        settings: everything else of :class:`tok1d.training.tasks.adversarial.AdversarialTask`.
    """

    def __init__(self, tokenizer: Tokenizer1D, init_from: str, teacher: str | None = None, **settings: Any) -> None:
        _start(tokenizer, init_from, teacher)
        super().__init__(tokenizer, None, **settings)
        for part in (tokenizer.encoder, tokenizer.quantizer):
            part.requires_grad_(False)
            for name in getattr(part, "loss_weights", {}):
                self.weights.pop(name, None)  # of a quantizer that does not learn
        self.train()

    def train(self, mode: bool = True) -> DecoderTask:
        """Encoder and quantizer stay in eval mode: no codes are drawn, no averages move."""
        super().train(mode)
        self.tokenizer.encoder.eval()
        self.tokenizer.quantizer.eval()
        return self


def _start(tokenizer: Tokenizer1D, init_from: str, teacher: str | None) -> None:
    """Copy the weights of a trained tokenizer, and those that its teacher adds to them."""
    found = load_named("init_from", init_from)
    if teacher is not None:
        found = add_pixels(found, load_named("teacher", teacher), soft=True)
    same = type(found.decoder) is type(tokenizer.decoder)
    if not same:
        log.info("init_from %s: a new %s is trained on its codes", init_from, type(tokenizer.decoder).__name__)
    copy_weights(tokenizer, found, init_from, PARTS if same else PARTS[:2])


def _teacher(source: str, decoder: ProxyCodeDecoder) -> Tokenizer1D:
    """The frozen tokenizer, if its codes are those that the decoder names."""
    teacher = load_named("teacher", source)
    patches, codes = decoder.grid[0] * decoder.grid[1], decoder.to_logits.out_features
    if (teacher.max_tokens, teacher.vocab_size) != (patches, codes):
        raise ModelError(
            f"teacher {source} gives an image {teacher.max_tokens} codes below {teacher.vocab_size}, the decoder names {patches} "
            f"(one a patch) below {codes}: set proxy_codes, patch_size and image_size to the teacher's"
        )
    return teacher
