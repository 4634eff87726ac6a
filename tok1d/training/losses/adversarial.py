"""The second player: formulas of adversarial training, and :class:`Adversary`, which keeps a discriminator outside of Lightning's loop.

Lightning sees one optimizer, so its steps, checkpoints and averages count once a batch by construction, accumulation and clipping
work as ever, and DDP or FSDP never meet the discriminator. Papers: hinge https://arxiv.org/abs/1705.02894, non-saturating
https://arxiv.org/abs/1406.2661, LeCam https://arxiv.org/abs/2104.03310, R1 https://arxiv.org/abs/1801.04406, lazy R1
https://arxiv.org/abs/1912.04958 (appendix B), adaptive weight https://arxiv.org/abs/2012.09841 (equation 7).

Shapes: B images; logits are (B, …), every number a verdict of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.quantizers.common import sum_over_ranks, world

LECAM_DECAY = 0.999
# What a discriminator loses on logits of real and of fake images, and what the generator does.
_FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "hinge": (lambda real: F.relu(1 - real), lambda fake: F.relu(1 + fake), lambda fake: -fake),
    "non_saturating": (lambda real: F.softplus(-real), F.softplus, lambda fake: F.softplus(-fake)),
}


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """Logits of real and fake images → scalar; the mean of both halves, as TiTok and VQGAN have it."""
    on_real, on_fake, _ = _FORMULAS[kind]
    return (on_real(real.float()).mean() + on_fake(fake.float()).mean()) / 2


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """Logits of reconstructions → scalar."""
    return _FORMULAS[kind][2](fake.float()).mean()


def lecam(means: Tensor, averages: Tensor) -> Tensor:
    """How far mean logits stray beyond the average of the other side: ``relu(r - f̄)² + relu(r̄ - f)²``.

    Args:
        means: float (2,), mean logits r of real and f of fake images.
        averages: float (2,), their moving averages r̄ and f̄, without gradient.
    """
    return F.relu(means[0] - averages[1]).square() + F.relu(averages[0] - means[1]).square()


def gradient_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """R1: mean over images of the squared norm of the gradient of an image's mean logit, in float32.

    Args:
        images: float (B, 3, H, W), real ones.
    """
    images = images.detach().float().requires_grad_(True)
    # Fused attention has no second derivative.
    with torch.autocast(images.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        logits = discriminator(images).reshape(len(images), -1).mean(1)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.flatten(1).square().sum(1).mean()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of ``x`` over all ranks, without gradient; every rank must call it."""
    return sum_over_ranks(x.detach().clone()) / world()[1]


def adaptive_weight(rec_loss: Tensor, gan_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Weight that makes both losses pull equally at the last layer: ‖∂rec‖ / (‖∂gan‖ + 1e-4), at most 1e4, without gradient.

    Gradients are averaged over ranks first, so that two processes weigh as one would. Every rank must call it.

    Args:
        rec_loss, gan_loss: scalars of one graph, which stays usable. The weight is 0 where the latter has none (before the start).
        last_layer: weight of the decoder's last layer.

    Raises:
        UsageError: a loss does not depend on ``last_layer``.
    """
    if not gan_loss.requires_grad:
        return rec_loss.new_zeros(())
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)[0] for loss in (rec_loss, gan_loss)]
    if any(g is None for g in gradients):
        raise UsageError("adaptive weight: a loss does not depend on the last layer; name the decoder's last trained layer")
    rec, gan = mean_over_ranks(torch.stack(gradients).float()).flatten(1).norm(dim=1)
    return (rec / (gan + 1e-4)).clamp(0, 1e4)


class Adversary:
    """A discriminator with its own optimizer, schedule, gradient exchange and scaler; no module, so nothing of it is in the
    tokenizer's state dict, average or export. It runs in the precision (autocast) that :meth:`generator_loss` was called in.

    Args:
        discriminator: float (B, 3, H, W) in [0, 1] → logits (B, …).
        loss: ``hinge`` or ``non_saturating``.
        start: optimizer steps before it is trained and used.
        lr: peak learning rate.
        betas, weight_decay: of AdamW; biases and norms are not decayed.
        warmup_steps: linear warm-up, from its start.
        final_lr: share of ``lr`` left at the last step (cosine).
        lecam: weight of the LeCam regulariser, 0 for none.
        r1: weight γ of the R1 penalty γ/2 ‖∇‖², 0 for none.
        r1_every: R1 is computed in one step of so many, with so many times the weight.
        gradient_clip: greatest norm of the gradient, 0 for no clipping.

    Example::

        adversary = Adversary(TiTokDiscriminator(), start=20_000, lecam=0.001)
        loss = l2 + 0.1 * adversary.generator_loss(reconstruction)      # then loss.backward()
        adversary.backward(images, reconstruction)                      # losses and mean logits by log name
        adversary.step(max_steps)   # after the tokenizer's optimizer step: once for all accumulated batches
    """

    def __init__(
        self,
        discriminator: nn.Module,
        loss: str = "hinge",
        start: int = 0,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        final_lr: float = 0.1,
        lecam: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        gradient_clip: float = 1.0,
    ) -> None:
        if loss not in _FORMULAS:
            raise UsageError(f"adversarial losses are {', '.join(_FORMULAS)}; got {loss!r}")
        if start < 0 or warmup_steps < 0 or r1_every < 1 or min(lecam, r1, gradient_clip, lr) < 0:
            raise UsageError("an adversary's start, warmup_steps, lr, lecam, r1 and gradient_clip are 0 or more and r1_every is 1 or more")
        self.discriminator, self.loss, self.start, self.lr = discriminator.train(), loss, start, lr
        self.warmup_steps, self.final_lr, self.gradient_clip = warmup_steps, final_lr, gradient_clip
        self.lecam, self.r1, self.r1_every = lecam, r1, r1_every
        self.params = [p for p in discriminator.parameters() if p.requires_grad]
        plain = {"params": [p for p in self.params if p.ndim < 2], "weight_decay": 0.0}
        groups = [{"params": [p for p in self.params if p.ndim > 1]}, plain]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), weight_decay=weight_decay)
        self.averages = torch.zeros(2)  # of mean logits of real and fake images
        self.steps = 0  # optimizer steps of the tokenizer
        self._means, self._pending = torch.zeros(2), 0  # sums over the batches since the last step, and their number
        self._precision: torch.dtype | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._saved_scaler: dict[str, Any] = {}
        self._together = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Adversary:
        return self  # an average of the tokenizer's weights copies its task

    @property
    def active(self) -> bool:
        """Whether it has started."""
        return self.steps >= self.start

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """What the tokenizer loses, a scalar; 0 before the start. The discriminator's own parameters get no gradient.

        Args:
            reconstruction: float (B, 3, H, W), not clamped.
        """
        if not self.active:
            return reconstruction.new_zeros(())
        self._settle(reconstruction.device)
        kind = reconstruction.device.type
        self._precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for p in self.params:
            p.requires_grad_(False)
        try:
            return generator_loss(self.discriminator(reconstruction), self.loss)
        finally:
            for p in self.params:
                p.requires_grad_(True)

    def backward(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Compute the discriminator's loss on a batch and accumulate its gradients; nothing before the start.

        Args:
            real, fake: float (B, 3, H, W), images and what became of them.

        Returns:
            Detached scalars by log name: ``discriminator``, ``logits_real``, ``logits_fake``, and ``lecam`` and ``r1`` where computed.
        """
        if not self.active:
            return {}
        self._settle(real.device)
        real, fake = real.detach(), fake.detach()
        with torch.enable_grad():
            with torch.autocast(real.device.type, dtype=self._precision, enabled=self._precision is not None):
                on_real, on_fake = self.discriminator(real).float(), self.discriminator(fake).float()
            found = {"discriminator": discriminator_loss(on_real, on_fake, self.loss)}
            means = torch.stack([on_real.mean(), on_fake.mean()])
            means = means + (mean_over_ranks(means) - means.detach())  # of all ranks, whose gradients are averaged later
            total = found["discriminator"]
            if self.lecam:
                found["lecam"] = lecam(means, self.averages)
                total = total + self.lecam * found["lecam"]
            if self.r1 and (self.steps - self.start) % self.r1_every == 0:
                found["r1"] = gradient_penalty(self.discriminator, real)
                total = total + self.r1 / 2 * self.r1_every * found["r1"]
            self._scale().scale(total).backward()
        self._means = self._means + means.detach()
        self._pending += 1
        found |= {"logits_real": means[0], "logits_fake": means[1]}
        return {name: value.detach() for name, value in found.items()}

    def step(self, max_steps: int) -> None:
        """Count an optimizer step of the tokenizer, and make one of the discriminator if gradients wait.

        Args:
            max_steps: of the run, where its schedule ends too.

        Raises:
            ModelError: the gradient is not finite (float16's scaler skips such steps instead).
        """
        if self._pending:
            self._exchange()
            scaler = self._scale()
            scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.params, self.gradient_clip or math.inf)
            if not scaler.is_enabled() and not torch.isfinite(norm):
                raise ModelError(
                    f"the norm of the discriminator's gradient became {norm.item()} after step {self.steps}. Continue from a checkpoint "
                    "with a lower learning rate of the adversary, or r1 above 0"
                )
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self._lr_factor(self.steps - self.start, max_steps - self.start)
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.averages.lerp_(self._means / self._pending, 1 - LECAM_DECAY)
            self._means, self._pending = torch.zeros_like(self._means), 0
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue exactly."""
        return {
            "steps": self.steps, "discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict(),
            "averages": self.averages.clone(), "scaler": self._scaler.state_dict() if self._scaler else self._saved_scaler,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ModelError: it is of another discriminator.
        """
        try:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self._saved_scaler = int(state["steps"]), dict(state["scaler"])
            self.averages = state["averages"].clone().to(self.averages.device)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"the checkpoint's adversary is not of this {type(self.discriminator).__name__} ({str(error).splitlines()[0][:200]}). "
                "Continue with the configuration of that run"
            ) from error
        if self._scaler is not None and self._saved_scaler:
            self._scaler.load_state_dict(self._saved_scaler)

    def _settle(self, device: torch.device) -> None:
        """Go where the images are; on first use take the weights of rank 0, for discriminators of a user's own that are not seeded."""
        if self.averages.device != device:
            self.discriminator.to(device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves its state to where the parameters are now
            self.averages, self._means = self.averages.to(device), self._means.to(device)
        if not self._together:
            for value in self.discriminator.state_dict().values() if world()[1] > 1 else ():
                torch.distributed.broadcast(value, 0)
            self._together = True

    def _scale(self) -> torch.amp.GradScaler:
        """The scaler of float16 gradients; idle in other precisions."""
        if self._scaler is None:
            self._scaler = torch.amp.GradScaler(self.averages.device.type, enabled=self._precision is torch.float16)
            if self._scaler.is_enabled() and self._saved_scaler:
                self._scaler.load_state_dict(self._saved_scaler)
        return self._scaler

    def _exchange(self) -> None:
        """Gradients become means over ranks and over the batches accumulated, through one flat buffer."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        flat = sum_over_ranks(torch.cat([g.flatten() for g in gradients])) / (world()[1] * self._pending)
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params])):
            p.grad = part.view_as(p)

    def _lr_factor(self, step: int, total: int) -> float:
        """Warm-up and cosine, as the tokenizer's schedule."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if total <= self.warmup_steps:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2
