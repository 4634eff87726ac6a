"""LeechShell: latents in 24 dimensions to the nearest of the 196,560 shortest vectors of the Leech lattice.

Paper: https://arxiv.org/abs/2512.14697. These are the most points a sphere in 24 dimensions holds at 60 degrees from each
other, so codes need no entropy loss. They are made here from the binary Golay code (Conway & Sloane, Sphere Packings, Lattices
and Groups, chapters 10 and 11), and the nearest is found exactly without comparing with all of them. Scaled by sqrt(32):

    ids      0 ..  97151   ±2 on an octad (759 words of weight 8), an even number of minus signs
         97152 .. 195455   -3 in one place and 1 elsewhere, then signs changed on one of the 4096 words
        195456 .. 196559   ±4 in two places

Shapes: B images, N tokens, m rows of latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import token_mean
from tok1d.tokenizers.quantizers.packing import pack_bits, unpack_bits

OCTADS, WORDS = 759, 4096
SECOND, THIRD, COUNT = OCTADS * 128, OCTADS * 128 + 24 * WORDS, 196_560  # first ids of the shapes, and their number
PAIRS_CPU, PAIRS_GPU = 2**22, 2**25  # latents x words compared at a time: a cache's worth, more where launches cost


class LeechShell(Quantizer):
    """The first shell of the Leech lattice as a fixed codebook of unit vectors, 17.58 bits a token; nothing is learned.

    Latents are 24 wide and brought to unit length; there are no losses. The stat ``cosine`` is that of latent and code.

    Example:
        >>> out = LeechShell()(torch.eye(24)[None, :1] + torch.eye(24)[None, 1:2])
        >>> out.ids.tolist(), out.q[0, 0, :3].tolist()
        ([[195456]], [0.7071067690849304, 0.7071067690849304, 0.0])
    """

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.vocab_size = 24, COUNT
        words = golay_words()
        octads = words[words.sum(-1) == 8]
        by_parity = torch.empty(WORDS, dtype=torch.int64, device="cpu")
        by_parity[pack_bits(words[:, 12:])] = torch.arange(WORDS, device="cpu")
        tables = {
            "_shell": leech_shell(words),  # (196560, 24)
            "_words": words.T.bool().contiguous(),  # (24, 4096)
            "_by_parity": by_parity,  # (4096,) of each parity, the word that has it: parity, too, tells words apart
            "_member": octads.T.contiguous(),  # (24, 759)
            "_octads": octads.nonzero()[:, 1].view(OCTADS, 8),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, 24), bool mask (B, N) True = keep → QuantizerOutput with unit vectors q."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            z = F.normalize(z, dim=-1)
            ids = self.codes_to_ids(z.detach())
            codes = self.ids_to_codes(ids)
            step = self.training and torch.is_grad_enabled()
            cosine = token_mean((z.detach() * codes).sum(-1), mask, step)
            q = codes + (z - z.detach())  # value of the code to the last bit, gradient of the sphere
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
        return QuantizerOutput(q, ids, {}, {"cosine": cosine})

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, 196560) → float32 (B, n, 24) unit vectors."""
        return self._shell[ids].float() * 32**-0.5

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, 24), any length → int64 (B, n), the codes of largest cosine."""
        with torch.autocast(codes.device.type, enabled=False):
            rows = codes.float().flatten(0, -2)
            pairs = PAIRS_CPU if rows.device.type == "cpu" else PAIRS_GPU
            found = [self._nearest(part) for part in rows.split(pairs // WORDS)]
        return torch.cat(found).view(codes.shape[:-1])

    def _nearest(self, x: Tensor) -> Tensor:
        """Float (m, 24) → int64 (m,): the best of each shape, then the best of the three."""
        shapes = (self._nearest_octad(x), self._nearest_word(x), self._nearest_pair(x))
        best = torch.stack([score for score, _ in shapes], -1).argmax(-1, keepdim=True)
        return torch.stack([ids for _, ids in shapes], -1).gather(-1, best).squeeze(-1)

    def _nearest_octad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Signs follow x; if that makes the minus signs odd, the smallest entry of the octad turns: scores and ids (m,)."""
        size, minus, member = x.abs(), x < 0, self._member.float()
        least = size[:, self._octads[:, 0]]
        for place in range(1, 8):
            least = torch.minimum(least, size[:, self._octads[:, place]])
        odd = (minus.float() @ member) % 2
        score, octad = (2 * (size @ member) - 4 * odd * least).max(-1)
        places = self._octads[octad]
        signs, sizes = minus.gather(1, places), size.gather(1, places)
        turn = F.one_hot(sizes.argmin(-1), 8).bool() & (signs.sum(-1, keepdim=True) % 2 == 1)
        return score, octad * 128 + pack_bits((signs ^ turn)[:, :7])

    def _nearest_word(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Place p of word w scores <x, ±1 of w> - 4 x_p (±1 of w)_p: so for each place and sign the best word is wanted."""
        total = x @ (1 - 2 * self._words.float())  # (m, 4096)
        best = torch.cat([_best_by_bit(total), _best_by_bit(total[:, self._by_parity])], 1)  # (m, 24, 2)
        score, at = (best - 4 * torch.stack([x, -x], -1)).flatten(1).max(-1)
        place, bit = at // 2, at % 2 == 1
        word = total.masked_fill(self._words[place] != bit[:, None], -torch.inf).argmax(-1)
        return score, SECOND + place * WORDS + word

    def _nearest_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two largest entries, with their signs: scores and ids (m,)."""
        size, at = x.abs().topk(2, -1)
        low, high = at.sort(-1).values.unbind(-1)
        signs = x.gather(1, torch.stack([low, high], -1)) < 0
        return 4 * size.sum(-1), THIRD + (high * (high - 1) // 2 + low) * 4 + pack_bits(signs)


def golay_words() -> Tensor:
    """The extended binary Golay code, uint8 (4096, 24) on the CPU: row i has the 12 bits of i, then 12 of parity."""
    residues = torch.zeros(11, dtype=torch.uint8, device="cpu")
    residues[[0, 1, 3, 4, 5, 9]] = 1  # squares modulo 11
    parity = torch.ones(12, 12, dtype=torch.uint8, device="cpu")
    parity[:11, :11] = torch.stack([residues.roll(-row) for row in range(11)])
    parity[11, 11] = 0
    message = unpack_bits(torch.arange(WORDS, device="cpu"), 12)
    return torch.cat([message, (message.long() @ parity.long() % 2).to(torch.uint8)], 1)


def leech_shell(words: Tensor) -> Tensor:
    """The 196,560 vectors of squared length 32 in the order of ids, int8 (196560, 24), from :func:`golay_words`."""
    octads = words[words.sum(-1) == 8].nonzero()[:, 1].view(OCTADS, 1, 8).expand(-1, 128, -1)
    signs = unpack_bits(torch.arange(128, device="cpu"), 7)
    signs = torch.cat([signs, signs.sum(-1, keepdim=True) % 2], 1)  # the eighth makes the number of minus signs even
    first = torch.zeros(OCTADS, 128, 24, dtype=torch.int8, device="cpu")
    first.scatter_(2, octads, (2 - 4 * signs.to(torch.int8)).expand(OCTADS, -1, -1))

    changed = 1 - 2 * torch.eye(24, dtype=torch.int8, device="cpu") * 2  # -3 on the diagonal
    second = changed[:, None] * (1 - 2 * words.to(torch.int8))

    high, low = torch.tril_indices(24, 24, -1, device="cpu")
    signs = 4 - 8 * unpack_bits(torch.arange(4, device="cpu"), 2).to(torch.int8)
    third = torch.zeros(len(high), 4, 24, dtype=torch.int8, device="cpu")
    third.scatter_(2, torch.stack([low, high], -1)[:, None].expand(-1, 4, -1), signs.expand(len(high), -1, -1))
    return torch.cat([first.flatten(0, 1), second.flatten(0, 1), third.flatten(0, 1)])


def _best_by_bit(scores: Tensor) -> Tensor:
    """Float (m, 4096) → (m, 12, 2): the largest where each bit of the index, most significant first, is 0 and is 1."""
    grid = scores.unflatten(1, (64, 64))
    halves = [
        half.unflatten(1, (2**place, 2, 2 ** (5 - place))).amax((1, 3))
        for half in (grid.amax(2), grid.amax(1))
        for place in range(6)
    ]
    return torch.stack(halves, 1)
