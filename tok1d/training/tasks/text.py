"""TextTask: adversarial training of a decoder that reads a description beside the codes (TA-TiTok).

The words come from the captions of the data through a frozen CLIP text tower. Paper: https://arxiv.org/abs/2501.07730, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.official.clip_text import CLIP, clip_ids, load_clip
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.frozen import Frozen
from tok1d.training.tasks.adversarial import AdversarialTask


class TextTask(AdversarialTask):
    """Adversarial training with encoded captions.

    Args:
        tokenizer: with a decoder that takes ``text``, such as :class:`tok1d.tokenizers.decoders.grid.TextGridDecoder`.
        text_model: CLIP model in the format of transformers, a folder or a hub name; its places and width are those of the decoder.
        settings: everything of :class:`tok1d.training.tasks.adversarial.AdversarialTask`.
    """

    def __init__(self, tokenizer: Tokenizer1D, *, text_model: str = CLIP, **settings: Any) -> None:
        if "text" not in tokenizer.decoder.options:
            raise UsageError(f"{type(tokenizer.decoder).__name__} reads no text; take AdversarialTask")
        super().__init__(tokenizer, **settings)
        self.text_model, self.clip = text_model, Frozen()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self.clip:
            pieces, encoder = load_clip(self.text_model)
            self.clip["pieces"], self.clip["encoder"] = pieces, encoder

    @torch.no_grad()
    def conditions(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``text``: float32 (B, T, V) of the captions, "" where an image has none.

        Raises:
            ModelError: the data has no captions.
        """
        if "text" not in batch:
            raise ModelError(
                "the data has no captions, which this decoder reads; lay .txt or .json files beside the images of a shard, or metadata.jsonl "
                'with "text" into a folder'
            )
        encoder = self.clip.on(self.device)["encoder"]
        ids = clip_ids(batch["text"], self.clip["pieces"], encoder.config.max_position_embeddings)
        with torch.autocast(self.device.type, enabled=False):
            return {"text": encoder(input_ids=ids.to(self.device)).last_hidden_state}
