"""TextCondition: states of a frozen text encoder at the front of the sequence, or their mean as a vector.

Any encoder of transformers serves (CLIP, T5, BERT types); it is loaded when the first text is met and never saved with the
generator. T5 states at the front of an autoregressive model: https://arxiv.org/abs/2406.06525 (LlamaGen).

Shapes: B rows, P places, E width of the encoder, W width of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.extras import require
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, Given, check_share
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.rotary_blocks import RMSNorm
from tok1d.training.frozen import Frozen


class TextCondition(Condition):
    """A description.

    Args:
        encoder: hub name or folder of a text encoder in the format of transformers, weights in safetensors.
        dim: E, width of its states (512 and 768 for CLIP, 768 for T5 base).
        length: P, places for the pieces of a text. Longer prompts are refused when sampling and cut in training.
        drop: probability that training leaves the text out.
    """

    guidable = True
    takes = "text"

    def __init__(self, encoder: str, dim: int = 768, length: int = 77, drop: float = 0.1) -> None:
        super().__init__()
        check_range("dim", dim, 1, 65536)
        check_range("length", length, 1, 4096)
        self.encoder, self.dim, self.length, self.drop = encoder, dim, length, check_share("drop", drop)
        self.frozen = Frozen()

    def attach(self, width: int, tokens: bool = True, vector: bool = False) -> None:
        self.norm = RMSNorm(self.dim)
        self.proj = nn.Linear(self.dim, width) if tokens else None
        self.pooled = nn.Linear(self.dim, width) if vector else None
        self.nothing = nn.Parameter(torch.randn(self.dim))  # stands where the states of a text would
        self.places = self.length if tokens else 0

    def request(self, rows: int, label: Any = None, text: Any = None) -> dict[str, Any]:
        if label is not None:
            raise TokenError(f"this generator takes a text, not a class, got label={label!r:.100}. Give text=")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts) or len(texts) not in (1, rows):
            raise TokenError(f"text must be one description, or one for each of the {rows} rows, got {text!r:.100}")
        for t, pieces in zip(texts, self._pieces(list(texts), cut=False), strict=True):
            if len(pieces) > self.length:
                raise TokenError(f"the prompt {t!r:.60} has {len(pieces)} pieces, this generator reads {self.length} at most. Shorten it")
        return {"text": list(texts) * (rows // len(texts))}

    def forward(self, batch: dict[str, Any], rows: int, chance: Chance | None = None) -> Given:
        texts = batch.get("text")
        if texts is None or len(texts) != rows:
            raise TokenError(f"a batch for this generator needs 'text', {rows} strings, got {texts!r:.100}")
        states, mask = self.encode(list(texts))
        left_out = torch.tensor([not t for t in texts], device=self.device)
        dropped = self.dropped(rows, chance)
        if dropped is not None:
            left_out = left_out | dropped.to(self.device)
        nothing, only = self._nothing(rows)
        states = torch.where(left_out[:, None, None], nothing, self.norm(states.to(nothing.dtype)))
        return self._given(states, torch.where(left_out[:, None], only, mask))

    def null(self, rows: int) -> Given:
        return self._given(*self._nothing(rows))

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts, cut to P pieces → last hidden states float32 (B, P, E), and bool (B, P) where they are of the text."""
        ids = torch.zeros(len(texts), self.length, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, pieces in enumerate(self._pieces(texts, cut=True)):
            ids[row, : len(pieces)] = torch.tensor(pieces, dtype=torch.int64)
            mask[row, : len(pieces)] = True
        model = self._load().on(self.device)["model"]
        ids, mask = ids.to(self.device), mask.to(self.device)
        longest = max(1, int(mask.sum(1).max())) if len(texts) else 1  # the encoder need not run over what no text reaches
        states = model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest].long()).last_hidden_state
        if states.shape[-1] != self.dim:
            raise ModelError(f"{self.encoder} has states of width {states.shape[-1]}, this condition was made with dim={self.dim}")
        return torch.nn.functional.pad(states.float(), (0, 0, 0, self.length - longest)), mask

    def _given(self, states: Tensor, mask: Tensor) -> Given:
        """Normed states (B, P, E)."""
        if self.pooled is not None:
            weight = mask[..., None].to(states.dtype)
            vector = self.pooled((states * weight).sum(1) / weight.sum(1).clamp(min=1))
        return Given(
            None if self.proj is None else self.proj(states),
            None if self.pooled is None else vector,
            None if self.proj is None else mask,
        )

    def _nothing(self, rows: int) -> tuple[Tensor, Tensor]:
        """The learned state at the first place, the only one that may be attended to."""
        mask = torch.zeros(rows, self.length, dtype=torch.bool, device=self.device)
        mask[:, 0] = True
        return self.nothing.expand(rows, self.length, -1), mask

    def _pieces(self, texts: list[str], cut: bool) -> list[list[int]]:
        tokenizer = self._load()["tokenizer"]
        if not texts:
            return []
        limit = {"truncation": True, "max_length": self.length} if cut else {"truncation": False, "verbose": False}
        return tokenizer(texts, **limit)["input_ids"]

    def _load(self) -> Frozen:
        """The encoder and its tokenizer."""
        if not self.frozen:
            transformers = require("transformers", "text")
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.encoder)
                model = transformers.AutoModel.from_pretrained(self.encoder, use_safetensors=True).float()
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{self.encoder}: the text encoder cannot be loaded ({error}). Give a hub name when online, or a folder with "
                    "its config.json, weights in safetensors and tokenizer files"
                ) from error
            if hasattr(model, "text_model") and hasattr(model, "vision_model"):
                model = model.text_model  # CLIP types
            elif getattr(model.config, "is_encoder_decoder", False):
                model = model.get_encoder()  # T5 types
            self.frozen["tokenizer"], self.frozen["model"] = tokenizer, model
        return self.frozen
