"""CodeBooks: tables of what ids stand for, against every quantizer that has them; those that have none are refused."""

import pytest
import torch

from tests.generators import tiny
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.bsq import BSQ
from tok1d.tokenizers.quantizers.code_books import CodeBooks
from tok1d.tokenizers.quantizers.dual import DualVQ
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.quantizers.growing_scale import GrowingScaleVQ
from tok1d.tokenizers.quantizers.kl import KL
from tok1d.tokenizers.quantizers.lfq import LFQ
from tok1d.tokenizers.quantizers.residual import ResidualVQ
from tok1d.tokenizers.quantizers.simvq import SimVQ
from tok1d.tokenizers.quantizers.vq import VQ

QUANTIZERS = {
    "nested": tiny.nested,
    "vq": lambda: VQ(20, 5),
    "unit vq": lambda: VQ(20, 5, l2=True),
    "vq ema": lambda: VQ(20, 5, ema=True),
    "fsq": lambda: FSQ([5, 4, 3]),
    "symmetric fsq": lambda: FSQ([2, 4], symmetric=True),
    "simvq": lambda: SimVQ(20, 5),
    "dual": lambda: DualVQ(20, 3, 2),
    "lfq": lambda: LFQ(6),
    "bsq": lambda: BSQ(6),
    "residual": lambda: ResidualVQ(4, 3, 3),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_books_say_what_the_quantizer_says(name, tokens):
    quantizer = QUANTIZERS[name]().eval()
    found = CodeBooks.of(quantizer, tokens)
    every = torch.arange(quantizer.vocab_size)[:, None].expand(-1, tokens)
    drawn = torch.randint(quantizer.vocab_size, (50, tokens))
    for ids in (every, drawn, drawn[:, : tokens // 2 + 1]):
        torch.testing.assert_close(found.codes(ids), quantizer.ids_to_codes(ids), rtol=1e-6, atol=1e-6)
    assert found.books.dtype == torch.float32 and found.book.unique().tolist() == list(range(len(found.books)))
    assert len(found.books) == (len(set(tiny.BOOK[:tokens])) if name == "nested" else 1)
    assert not any(x.requires_grad for x in (found.books, found.scale))
    before = found.books.clone()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.zero_()
    assert torch.equal(found.books, before), "a copy"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KL(4), "needs 2 to 65536 ids with a code each, KL is continuous and has no ids"),
        (lambda: FSQ([64, 64, 64]), "FSQ has 262144 ids"),
        (lambda: BSQ(70), "BSQ has 2\\^70 ids"),
        (lambda: GrowingScaleVQ(16, 4, [1, 2, 4]), "codes of several tokens together"),
        (tiny.nested, "has 8 tokens, asked for the codes of 9"),
    ],
)
def test_quantizers_without_a_code_for_every_id(make, said):
    with pytest.raises(ModelError, match=said):
        CodeBooks.of(make(), 9)


def test_codes_that_depend_on_other_tokens():
    class Running(VQ):
        def ids_to_codes(self, ids):
            return super().ids_to_codes(ids).cumsum(1)

    with pytest.raises(ModelError, match="Running makes codes of several tokens together"):
        CodeBooks.of(Running(8, 2), 3)
    assert len(CodeBooks.of(Running(8, 2), 1).books) == 1
