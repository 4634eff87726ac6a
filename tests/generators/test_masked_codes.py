"""CodesBody: inputs and logits by codes, wherever a token is; what every body does is tested with the others (test_masked)."""

import json

import pytest
import torch

from tests.generators import tiny
from tests.training import tiny as tokenizers
from tok1d.errors import ModelError
from tok1d.generators.codes import give_codes, wants_codes
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.masked_body import MaskedBody, TrunkBody
from tok1d.generators.masked_codes import CodesBody
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.code_books import CodeBooks


def masked() -> MaskedGenerator:
    torch.manual_seed(0)
    body = CodesBody(32, 2, 2, features=6, inner=8)
    body.take(CodeBooks.of(tiny.nested(), 8))
    return tiny.awake(MaskedGenerator(tiny.IDS, ClassCondition(3), body)).eval()


@torch.no_grad()
def test_logits_of_some_places_are_those_of_all():
    """Other places in every row, each with the book of its token."""
    body, states = masked().body, torch.randn(3, 8, 32)
    places = torch.stack([torch.randperm(8)[:5] for _ in range(3)])
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(body.logits(states[rows, places], places), body.logits(states)[rows, places])


@torch.no_grad()
def test_logits_are_affine_in_the_states():
    body = masked().body
    c, u = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    for g in (0.0, 1.0, 3.5):
        torch.testing.assert_close(body.logits(u + g * (c - u)), body.logits(u) + g * (body.logits(c) - body.logits(u)), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_ids_of_one_code_are_one_input_and_masked_ones_are_blank():
    """Tokens 1 and 2 share a book, 0 and 1 do not; a masked token is told its place and nothing else."""
    model = masked()
    table, ids = model.body.codes, torch.full((1, 8), 5)
    x = table.embed(ids, blank=model.body.blank)
    code = tiny.nested().codebooks[2, 5] / tiny.nested().codebooks[2].square().mean().sqrt()
    for t in (1, 2):
        inner = table.input(code) + table.place.weight[t]
        torch.testing.assert_close(x[0, t], inner + table.mix(torch.nn.functional.silu(inner)))
    hidden = table.embed(torch.full((1, 8), 16), blank=model.body.blank)
    inner = model.body.blank + table.place.weight
    torch.testing.assert_close(hidden[0], inner + table.mix(torch.nn.functional.silu(inner)))


def test_features_are_computed_once_a_sample():
    model, count = masked(), []
    compute = model.body.codes._features
    model.body.codes._features = lambda: count.append(1) or compute()
    model.generate(3, label=1, guidance=3.0, steps=6)
    assert len(count) == 1


def test_what_is_saved_comes_back_without_the_tokenizer(tmp_path):
    model = masked()
    model.save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())["body"]
    assert (body["books"], body["dim"], body["inner"]) == (4, 3, 8)
    back = Generator.from_pretrained(tmp_path)
    asked = {"label": 2, "guidance": 2.0, "tokens": 6, "steps": 3}
    assert back.model_id == model.model_id and torch.equal(back.generate(4, **asked).ids, model.generate(4, **asked).ids)


def test_codes_are_given_or_missed():
    tokenizer = tokenizers.spectral().eval()
    space = TokenSpace.of(tokenizer).first(4)
    made = MaskedGenerator(space, Unconditional(), CodesBody(16, 1, 2, features=4, inner=4))
    assert wants_codes(made)
    with pytest.raises(ModelError, match="CodesBody has no codes yet: give_codes"):
        made.losses({"ids": torch.zeros(1, 4, dtype=torch.int64)})
    give_codes(made, tokenizer)
    direct = MaskedGenerator(space, Unconditional(), CodesBody.of(tokenizer, tokens=4, width=16, depth=1, heads=2, features=4, inner=4))
    assert made.to_config() == direct.to_config() and torch.equal(made.body.codes.books, direct.body.codes.books)
    with pytest.raises(ModelError, match="CodesBody computes features of the codes of up to 65536 ids"):
        MaskedGenerator(TokenSpace(tokens=4, vocab_size=2**17), Unconditional(), CodesBody(16, 1, 2))


def held_out(body: MaskedBody) -> float:
    """Nats of a masked token of new rows after 40 steps on 256: four points, each in a book of its own, near one another."""
    torch.manual_seed(0)
    books = torch.randn(4, 256, 2)
    draw = torch.Generator().manual_seed(1)
    if isinstance(body, CodesBody):
        body.take(CodeBooks(books, torch.arange(4), torch.ones(4, 2)))

    def rows(count: int) -> torch.Tensor:
        point = torch.randn(count, 2, generator=draw)
        return torch.stack([torch.cdist(point + 0.1 * torch.randn(count, 2, generator=draw), book).argmin(1) for book in books], 1)

    model = MaskedGenerator(TokenSpace(tokens=4, vocab_size=256), Unconditional(), body, label_smoothing=0.0, unmasked_weight=0.0)
    optimizer, few, new = torch.optim.AdamW(model.parameters(), lr=1e-2), rows(256), rows(256)
    for _ in range(40):
        loss = model.losses({"ids": few[torch.randint(256, (64,), generator=draw)]}, draw)[0]["token"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval().losses({"ids": new}, torch.Generator().manual_seed(0))[0]["token"].item()


def test_learns_from_few_rows_what_a_table_cannot():
    codes, table = held_out(CodesBody(32, 1, 2, features=16, inner=32)), held_out(TrunkBody(32, 1, 2))
    assert codes < 5 and codes < table - 0.6, (codes, table)  # every id equally likely: 5.5
