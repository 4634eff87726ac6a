"""IBQ: index backpropagation quantization — gradients reach all codes through the softmax that the choice is made from.

Paper: https://arxiv.org/abs/2412.02692. With p = softmax(<z, e_k>) and one-hot(argmax p) = o, the code is
q = (o + p - sg[p])ᵀ E: the value of one code, the gradient of all. Written out that is a table of M × K per image, and
the entropy term needs more of them. Here both are functions with a gradient of their own that make the table a few rows
at a time, once forward and once backward: besides inputs, codes and their gradients, memory is that of two pieces
(`PIECE_CPU` or `PIECE_GPU` scores each), however many tokens there are.

Shapes: B images, N tokens, D width, K codes, M = B · N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import (
    count_ids,
    kept_only,
    sum_over_ranks,
    token_mean,
    usage_stats,
    world,
)
from tok1d.tokenizers.quantizers.vq_search import nearest

PIECE_CPU, PIECE_GPU = 2**21, 2**23  # scores held at a time


class IBQ(Quantizer):
    """Index backpropagation quantization.

    Args:
        vocab_size: K.
        dim: D.
        l2: compare and return unit vectors.
        beta: published weight of the ``codebook`` loss; goes into ``loss_weights``.
        entropy: published weight of the ``entropy`` loss; 0 leaves the term, and its cost, out.
        temperature: of the softmax that gradients pass through.
        entropy_temperature: of the softmax whose entropies are taken.

    The losses are unweighted means over kept tokens: ``quantization``, the squared error of q with gradient to latents
    and all codes; ``commitment`` (latents towards the chosen codes) and ``codebook`` (chosen codes towards latents);
    ``entropy``, that of a token's softmax less that of the mean softmax over the tokens of all ranks, in nats.

    Example:
        >>> ibq = IBQ(16, 4)
        >>> out = ibq(torch.randn(2, 8, 4))
        >>> out.q.square().sum().backward()
        >>> bool((ibq.codebook.grad != 0).all())
        True
    """

    picture_gradient = True

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2: bool = False,
        beta: float = 0.25,
        entropy: float = 0.05,
        temperature: float = 1.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        check_range("vocab_size", vocab_size, 2, 2**26)
        check_range("dim", dim, 1, 65536)
        if not (temperature > 0 and entropy_temperature > 0):
            raise ModelError(f"temperatures must be above 0, got {temperature} and {entropy_temperature}")
        self.vocab_size, self.dim, self.l2 = vocab_size, dim, l2
        self.temperature, self.entropy_temperature = temperature, entropy_temperature
        self.loss_weights = {"quantization": 1.0, "commitment": 1.0, "codebook": beta}
        if entropy:
            self.loss_weights["entropy"] = entropy
        codebook = torch.empty(vocab_size, dim).uniform_(-1 / vocab_size, 1 / vocab_size)
        self.codebook = nn.Parameter(F.normalize(torch.randn(vocab_size, dim), dim=-1) if l2 else codebook)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput with ids in [0, K)."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z, book = kept_only(z, mask), self.codebook.float()
            if self.l2:
                z, book = F.normalize(z, dim=-1), F.normalize(book, dim=-1)
            rows = z.flatten(0, 1)
            ids = _largest(rows.detach(), book.detach())
            # Rows of `book`, which codes_to_ids and ids_to_codes also take; masked ones are weighed with 0 below.
            q = _IndexGradient.apply(rows, book, ids, self.temperature).view(z.shape)
            hard, ids = F.embedding(ids, book).view(z.shape), ids.view(z.shape[:2])
            losses = {
                "quantization": token_mean((q - z).square().mean(-1), mask, step),
                "commitment": token_mean((hard.detach() - z).square().mean(-1), mask, step),
                "codebook": token_mean((hard - z.detach()).square().mean(-1), mask, step),
            }
            if "entropy" in self.loss_weights:
                keep = rows.new_ones(len(rows)) if mask is None else mask.flatten().float()
                losses["entropy"] = _Entropy.apply(rows, book, keep, self.entropy_temperature, step)
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
            counts = count_ids(ids, mask, self.vocab_size)
            if step:
                sum_over_ranks(counts)
        return QuantizerOutput(q, ids, losses, usage_stats(counts))

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K) → float32 (B, n, D)."""
        codes = F.embedding(ids, self.codebook).float()
        return F.normalize(codes, dim=-1) if self.l2 else codes

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) codes (not latents) → int64 (B, n), the nearest: by product a longer code would win over itself."""
        return nearest(codes.flatten(0, -2), self.codebook, self.l2).view(codes.shape[:-1])


def _pieces(rows: Tensor, book: Tensor, temperature: float, rooms: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows a few at a time: which, and tensors (m, K), the first holding the scores of all codes, the others to be filled.

    The tensors are the same memory for every piece. Made anew each time, the gaps they leave are too small for the next
    aligned one, and the process grows to the size of the whole table.
    """
    step = max(1, (PIECE_CPU if rows.device.type == "cpu" else PIECE_GPU) // len(book))
    room = [rows.new_empty(min(step, len(rows)), len(book)) for _ in range(rooms)]
    for start in range(0, len(rows), step):
        s = slice(start, min(start + step, len(rows)))
        here = [r[: s.stop - start] for r in room]
        torch.mm(rows[s], book.T, out=here[0]).div_(temperature)
        yield s, here


@torch.no_grad()
def _largest(rows: Tensor, book: Tensor) -> Tensor:
    """Float (M, D), (K, D) → int64 (M,), the code of largest product with each row."""
    ids = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for s, (scores,) in _pieces(rows, book, 1.0, 1):
        ids[s] = scores.argmax(-1)
    return ids


class _IndexGradient(torch.autograd.Function):
    """q = (o + p - sg[p])ᵀ E with p = softmax(Z Eᵀ / t): rows of E forward, the gradient of the softmax backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, book: Tensor, ids: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(rows, book, ids)
        ctx.temperature = temperature
        return F.embedding(ids, book)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, book, ids = ctx.saved_tensors
        to_rows, to_book = torch.zeros_like(rows), torch.zeros_like(book)
        to_book.index_add_(0, ids, grad)  # the factor E: o + p - sg[p] is o
        with torch.autocast(rows.device.type, enabled=False):  # whoever calls backward() within autocast
            for s, (scores, p) in _pieces(rows, book, ctx.temperature, 2):
                _softmax(scores, p)
                _through_softmax(p, torch.mm(grad[s], book.T, out=scores)).div_(ctx.temperature)
                torch.mm(scores, book, out=to_rows[s])
                to_book.addmm_(scores.T, rows[s])
        return to_rows, to_book, None, None


class _Entropy(torch.autograd.Function):
    """mean H(p_m) - H(mean p_m) of p = softmax(Z Eᵀ / t), over rows with keep = 1; in a step the second mean is all ranks'.

    Averaged over ranks, gradients are those of the same number for the concatenated batch (see ``token_mean``).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, book: Tensor, keep: Tensor, temperature: float, step: bool) -> Tensor:
        count, mean = keep.sum(), rows.new_zeros(len(book))
        entropy = rows.new_zeros(())
        for s, (log_p, p) in _pieces(rows, book, temperature, 2):
            _softmax(log_p, p)
            mean.addmv_(p.T, keep[s])
            entropy -= (log_p.mul_(p).sum(-1) * keep[s]).sum()
        if step:
            sum_over_ranks(mean), sum_over_ranks(count)
            count = count / world()[1]
        # the mean is over all ranks' tokens, `count` is their mean number on a rank
        mean = mean / (count * (world()[1] if step else 1)).clamp(min=1)
        weight = keep / count.clamp(min=1)
        ctx.save_for_backward(rows, book, weight, mean)
        ctx.temperature = temperature
        return entropy / count.clamp(min=1) + torch.special.xlogy(mean, mean).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, book, weight, mean = ctx.saved_tensors
        to_rows, to_book = torch.zeros_like(rows), torch.zeros_like(book)
        log_mean = mean.clamp(min=torch.finfo(torch.float32).tiny).log()
        with torch.autocast(rows.device.type, enabled=False):
            for s, (scores, p) in _pieces(rows, book, ctx.temperature, 2):
                log_p = _softmax(scores, p)
                # d/dp of -p log p is -log p - 1 and of m log m it is log m + 1; the ones vanish in the softmax
                _through_softmax(p, torch.sub(log_mean, log_p, out=scores))
                scores.mul_((weight[s] * grad / ctx.temperature)[:, None])
                torch.mm(scores, book, out=to_rows[s])
                to_book.addmm_(scores.T, rows[s])
        return to_rows, to_book, None, None, None


def _softmax(scores: Tensor, p: Tensor) -> Tensor:
    """Fill ``p`` (m, K) with the softmax of ``scores``, and those with its logarithm."""
    scores.sub_(scores.amax(-1, keepdim=True))
    total = torch.exp(scores, out=p).sum(-1, keepdim=True)
    p.div_(total)
    return scores.sub_(total.log_())


def _through_softmax(p: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the scores from that of their softmax p, both (m, K); overwrites ``grad``."""
    grad.mul_(p)
    return grad.addcmul_(p, grad.sum(-1, keepdim=True), value=-1)
