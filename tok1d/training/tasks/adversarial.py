"""AdversarialTask: reconstruction with a discriminator beside it.

The discriminator is not in Lightning's loop (:class:`tok1d.training.losses.adversarial.Adversary`): there is one optimizer, and
one batch is one step, of whatever counts them. Shapes: B images of H × W pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.losses.adversarial import Adversary, adaptive_weight
from tok1d.training.tasks.reconstruction import ReconstructionTask


class AdversarialTask(ReconstructionTask):
    """Reconstruction, and pictures that a discriminator takes for real ones.

    Args:
        tokenizer, init_from: see :class:`tok1d.training.tasks.base.TokenizerTask`.
        adversary: the discriminator with its optimizer and when it starts.
        adaptive: weigh the loss ``gan`` so that it pulls as much at the decoder's last layer as all other losses of pictures
            together (VQGAN, https://arxiv.org/abs/2012.09841, equation 7), times its weight.
        settings: as :class:`tok1d.training.tasks.reconstruction.ReconstructionTask`; ``weights`` must name ``gan``, the loss of a
            picture that is found out. None: ``l1`` 1.0 and ``gan`` 0.1.
    """

    def __init__(
        self, tokenizer: Tokenizer1D, init_from: str | None = None, *, adversary: Adversary, adaptive: bool = False, **settings: Any
    ) -> None:
        if settings.get("weights") is None:
            settings["weights"] = {"l1": 1.0, "gan": 0.1}
        if not settings["weights"].get("gan"):
            raise UsageError("weights: an adversary has a weight too; give one, such as gan: 0.1, or take ReconstructionTask")
        if tokenizer.decoder.objective == "own":
            raise UsageError(f"{type(tokenizer.decoder).__name__} paints no picture in training that an adversary could look at")
        super().__init__(tokenizer, init_from, **settings)
        self.adversary, self.adaptive = adversary, adaptive
        self._played: tuple[Tensor, Tensor] | None = None  # real and fake images of this batch
        if adaptive and not tokenizer.decoder.last_layer.requires_grad:
            raise UsageError("adaptive: the decoder's last layer is not trained, so nothing can be weighed there; set adaptive: false")

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.adaptive and any("decoder" in name or name == "tokenizer" for name in self.compiled):
            from torch._functorch import config

            config.donated_buffer = False  # compiled code gives away what the gradient is taken of twice here
        super().setup(stage)

    def pixel_losses(self, images: Tensor, target: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = super().pixel_losses(images, target, batch)
        gan = self.adversary.generator_loss(images)
        if self.adversary.active:
            self._played = target, images.detach()
            if self.adaptive:
                pictures = sum(self.weight_of(name) * value for name, value in found.items())
                factor = adaptive_weight(pictures, gan, self.tokenizer.decoder.last_layer)
                self.log("train/adaptive_weight", factor)
                gan = gan * factor
        return {**found, "gan": gan}

    def on_after_backward(self) -> None:
        """The other player's turn, on the same images; its gradients add up like the tokenizer's."""
        if self._played is not None:
            found, self._played = self.adversary.backward(*self._played), None
            self.log_dict({f"train/{name}": value for name, value in found.items()})

    def after_step(self) -> None:
        try:
            self.adversary.step(self.trainer.max_steps)
        except ModelError as error:
            self.watch.stop(str(error), self._log_folder(), self.global_step)
        super().after_step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["adversary"] = self.adversary.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "adversary" not in checkpoint:
            raise ModelError("the checkpoint is of a run without an adversary; start from its weights instead (init_from of the exported model)")
        self.adversary.load_state_dict(checkpoint["adversary"])
