"""Codes: the head that knows what ids stand for, against sums written out, sampled, saved, refused, and learning sooner than a table."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.generators import tiny
from tests.training import tiny as tokenizers
from tok1d.errors import ModelError, TokenError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.chance import Chance
from tok1d.generators.codes import give_codes, wants_codes
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.heads import Softmax, TokenHead
from tok1d.generators.heads_codes import Codes
from tok1d.generators.rar import RARGenerator
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.code_books import CodeBooks


def model(tokens: int = 8, kind=AutoregressiveGenerator, condition=None, **arguments) -> Generator:
    torch.manual_seed(0)
    head = Codes(features=6, hidden=8)
    head.take(CodeBooks.of(tiny.nested(), tokens))
    space = TokenSpace(tokens=tokens, vocab_size=16, nested=True)
    made = kind(space, condition or ClassCondition(3), **{"width": 32, "depth": 2, "heads": 2, **arguments}, head=head)
    return tiny.awake(made).eval()


# logits ----------------------------------------------------------------------------------------------------------


def brute(head: Codes, state: torch.Tensor, token: int) -> torch.Tensor:
    """float (W,) → (K,), id after id."""
    table, quantizer = head.codes, tiny.nested()
    units = quantizer.codebooks[tiny.BOOK[token]].square().mean().sqrt()
    number = sorted(set(tiny.BOOK)).index(tiny.BOOK[token])
    found = []
    for code in quantizer.codebooks[tiny.BOOK[token]] / units:
        inner = F.gelu(table.inner.weight @ code + table.inner.bias + table.offset[number, 0])
        phi = table.outer.weight @ inner + table.outer.bias + table.linear.weight @ code
        found.append((table.query.weight @ state + table.query.bias) @ phi)
    return torch.stack(found) + table.bias[number]


@torch.no_grad()
def test_logits_are_what_they_are_said_to_be():
    head = model().head
    states, ids = torch.randn(3, 8, 32), tiny.tokens(tiny.IDS, 3)
    expected = torch.stack([torch.stack([brute(head, states[b, t], t) for t in range(8)]) for b in range(3)])
    torch.testing.assert_close(head.codes.logits(states), expected, atol=1e-5, rtol=1e-5)
    for n in (1, 2, 5):
        torch.testing.assert_close(head.codes.logits(states[:, :n]), expected[:, :n], atol=1e-5, rtol=1e-5)
    nats = -expected.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(head.loss(states, ids, Chance(3)), nats, atol=1e-5, rtol=1e-5)
    places = torch.stack([torch.randperm(8)[:5] for _ in range(3)])
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(head.codes.logits(states[rows, places], places), expected[rows, places], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.at(places).loss(states[rows, places], ids[rows, places], Chance(3)), nats[rows, places], atol=1e-5, rtol=1e-5)
    for t in range(8):
        torch.testing.assert_close(head.at(t).loss(states[:, t : t + 1], ids[:, t : t + 1], Chance(3)), nats[:, t : t + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head.at(t).embed(ids[:, t : t + 1]), head.embed(ids)[:, t : t + 1])
        likeliest = head.at(t).sample(states[:, t], torch.rand(3, 1, dtype=torch.float64), 1.0, 0.0)
        assert torch.equal(likeliest, expected[:, t].argmax(1))
    torch.testing.assert_close(head.at(places).embed(ids[rows, places]), head.embed(ids)[rows, places])


def test_untrained_all_ids_are_equally_likely_and_a_prior_can_be_told():
    head = Codes(6, 8)
    head.take(CodeBooks.of(tiny.nested(), 8))
    head.attach(32, tiny.IDS)
    states = torch.randn(2, 8, 32)
    assert not head.codes.logits(states).any()
    with torch.no_grad():
        head.codes.bias[2, 5] = 4.0  # the third of the books in use: tokens 1 and 2
    likely = head.codes.logits(states).softmax(-1)[0, :, 5]
    assert [t for t in range(8) if likely[t] > 0.5] == [1, 2]


@torch.no_grad()
def test_guided_states_give_guided_logits():
    head = model().head
    states, uniform = torch.randn(6, 32), torch.rand(3, 1, dtype=torch.float64)
    for t in (0, 4):
        with_, without = head.codes.logits(states[:, None], t)[:, 0].chunk(2)
        guided = without + 3.0 * (with_ - without)
        assert torch.equal(head.at(t).sample(states, uniform, 3.0, 0.0), guided.argmax(1))


def test_gradient_reaches_everything_that_learns():
    made = model().train()
    made.losses({"ids": tiny.tokens(tiny.IDS, 4), "label": torch.tensor([0, 1, 2, 0])})[0]["token"].backward()
    table = made.head.codes
    assert all(p.grad is not None and p.grad.any() for p in table.parameters())
    assert {"books", "book"} == {name for name, _ in table.named_buffers()}
    made.zero_grad()
    made.eval().losses({"ids": tiny.tokens(tiny.IDS, 4), "label": torch.tensor([0, 1, 2, 0])})[0]["token"].backward()
    assert table.inner.weight.grad.any(), "features that were kept would have no gradient"


# sampling and disk -----------------------------------------------------------------------------------------------


def test_features_are_computed_once_and_again_when_something_changed():
    made = model()
    table, count = made.head.codes, []
    compute = table._features
    table._features = lambda: count.append(1) or compute()
    first = made.generate(2, label=1, guidance=2.0, seeds=4).ids
    assert len(count) == 1
    assert torch.equal(made.generate(2, label=1, guidance=2.0, seeds=4).ids, first) and len(count) == 1
    with torch.no_grad():
        table.inner.weight.mul_(-3)
    changed = made.generate(2, label=1, guidance=2.0, seeds=4).ids
    assert len(count) == 2 and not torch.equal(changed, first)
    table.forget()
    assert torch.equal(made.generate(2, label=1, guidance=2.0, seeds=4).ids, changed) and len(count) == 3
    ids = first.clone()  # made in inference mode, it could not be learned from
    made.train().losses({"ids": ids, "label": torch.tensor([0, 1])})
    made.losses({"ids": ids, "label": torch.tensor([0, 1])})
    assert len(count) == 5, "in training every time"


@torch.no_grad()
def test_features_of_half_precision_are_not_kept():
    made, states = model(), torch.randn(2, 8, 32)
    exact = made.head.codes.logits(states)
    made.head.codes.forget()
    with torch.autocast("cpu", torch.bfloat16):
        rough = made.head.codes.logits(states)
    assert torch.equal(made.head.codes.logits(states), exact) and not torch.equal(rough.float(), exact)


def test_token_by_token_is_all_at_once():
    """Every token of a greedy row is the likeliest after those before it, in one forward without a cache."""
    made = model()
    ids = made.generate(3, label=[0, 1, 2], temperature=0.0).ids
    with torch.no_grad():
        states = made.states(made.condition({"label": torch.arange(3)}, 3), ids)
        assert torch.equal(made.head.codes.logits(states).argmax(-1), ids)


@pytest.mark.parametrize("kind", [AutoregressiveGenerator, RARGenerator])
def test_a_short_row_is_the_beginning_of_a_long_one(kind):
    made = model(kind=kind)
    long = made.generate(4, label=1, seeds=9, guidance=1.5).ids
    for n in (1, 3, 7):
        assert torch.equal(made.generate(4, label=1, seeds=9, guidance=1.5, tokens=n).ids, long[:, :n])
    assert torch.equal(made.generate(4, label=1, seeds=9, guidance=1.5, prefix=long[:, :3]).ids, long)


def test_random_orders_are_the_same_tokens_elsewhere():
    """Nats of a token do not depend on where it stands in the batch, but on which token it is."""
    made = model(kind=RARGenerator)
    ids, order = tiny.tokens(tiny.IDS, 2), torch.stack([torch.randperm(8), torch.randperm(8)])
    states = torch.randn(2, 8, 32)
    natural = made.head.loss(states, ids, Chance(2))
    shuffled = made.head.at(order).loss(states.gather(1, order[..., None].expand(-1, -1, 32)), ids.gather(1, order), Chance(2))
    torch.testing.assert_close(shuffled, natural.gather(1, order))
    loss, _ = model(kind=RARGenerator, random_until=5, natural_from=9).train().losses({"ids": ids, "label": torch.tensor([0, 1]), "step": 0})
    assert loss["token"].isfinite()


def test_what_is_saved_comes_back_without_the_tokenizer(tmp_path):
    made = model(variable="announced")
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head"] == {
        "class": "tok1d.generators.heads_codes.Codes", "features": 6, "hidden": 8, "books": 4, "dim": 3,
    }  # fmt: skip
    back = Generator.from_pretrained(tmp_path)
    assert back.to_config() == made.to_config() and back.model_id == made.model_id
    assert torch.equal(back.head.codes.books, made.head.codes.books) and back.head.codes.book.tolist() == [0, 2, 2, 1, 1, 1, 0, 3]
    asked = {"label": 2, "seeds": 1, "guidance": 2.0, "tokens": 6}
    assert torch.equal(back.generate(5, **asked).ids, made.generate(5, **asked).ids)
    made.save_pretrained(tmp_path / "half", dtype=torch.float16)
    torch.testing.assert_close(Generator.from_pretrained(tmp_path / "half").head.codes.books, made.head.codes.books, rtol=1e-3, atol=1e-3)


def test_only_books_of_the_first_tokens_are_kept():
    head = model(tokens=3).head
    assert head.codes.book.tolist() == [0, 1, 1] and head.codes.books.shape == (2, 16, 3)
    torch.testing.assert_close(head.codes.books.square().mean((1, 2)), torch.ones(2))
    assert head.config["books"] == 2


# tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tokenizers.fsq, tokenizers.vq_ema, tokenizers.spectral])
def test_codes_of_a_tokenizer_before_or_after(make):
    tokenizer = make().eval()
    space = TokenSpace.of(tokenizer).first(4)
    before = AutoregressiveGenerator(space, Unconditional(), 16, 1, 2, head=Codes.of(tokenizer, tokens=4, features=8, hidden=8))
    after = AutoregressiveGenerator(space, Unconditional(), 16, 1, 2, head=Codes(8, 8))
    assert wants_codes(after) and not wants_codes(before)
    with pytest.raises(ModelError, match="Codes has no codes yet: give_codes"):
        after.losses({"ids": torch.zeros(1, 4, dtype=torch.int64)})
    give_codes(after, tokenizer)
    assert not wants_codes(after) and after.to_config() == before.to_config() and after.to_config()["head"]["dim"] == tokenizer.quantizer.dim
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.eval().generate(2).ids, before.eval().generate(2).ids)
    assert after.generate(2).model_id == tokenizer.model_id


def test_refusals():
    with pytest.raises(ModelError, match="codes of up to 65536 ids, wide has 66 bits|wide has bits"):
        Codes().attach(8, TokenSpace(tokens=4, kind="bits", bits=66, tokenizer="wide"))
    with pytest.raises(ModelError, match="codes of up to 65536 ids, big has 65537 ids"):
        Codes().attach(8, TokenSpace(tokens=4, vocab_size=65537, tokenizer="big"))
    with pytest.raises(ModelError, match="KL is continuous"):
        Codes.of(tokenizers.kl())
    with pytest.raises(ModelError, match="codes of 3 tokens and 16 ids, Codes is for 8 tokens and 16 ids"):
        head = Codes()
        head.take(CodeBooks.of(tiny.nested(), 3))
        head.attach(8, tiny.IDS)
    with pytest.raises(ModelError, match="has 2 codebooks of width 3, these are 4 of width 3; leave books and dim out"):
        Codes(books=2, dim=3).take(CodeBooks.of(tiny.nested(), 8))
    with pytest.raises(ModelError, match="both or none"):
        Codes(books=2)
    with pytest.raises(ModelError, match="features must be"):
        Codes(features=0)
    made = AutoregressiveGenerator(TokenSpace.of(tokenizers.fsq()), Unconditional(), 16, 1, 2, head=Codes())
    with pytest.raises(TokenError, match="has vocab_size|same form, other weights"):
        give_codes(made, tokenizers.vq_ema())


def test_sizes_without_codes_never_look_like_a_model():
    """A configuration alone knows sizes; until weights are loaded the codes are nan, not something plausible."""
    made = Generator.from_config(model().to_config())
    assert wants_codes(made) and made.losses({"ids": tiny.tokens(tiny.IDS, 1), "label": torch.tensor([0])})[0]["token"].isnan()


# learning --------------------------------------------------------------------------------------------------------


def held_out(head: TokenHead, steps: int = 30) -> float:
    """Nats per token of new rows after training on few. What is told: a point moves to near its mirror image, in four books."""
    torch.manual_seed(0)
    books = torch.randn(4, 256, 2)
    draw = torch.Generator().manual_seed(1)

    def rows(count: int) -> torch.Tensor:
        point, found = torch.randn(count, 2, generator=draw), []
        for book in books:
            found.append(torch.cdist(point, book).argmin(1))
            point = -book[found[-1]] + 0.1 * torch.randn(count, 2, generator=draw)
        return torch.stack(found, 1)

    if isinstance(head, Codes):
        head.take(CodeBooks(books, torch.arange(4), torch.ones(4, 2)))
    model = AutoregressiveGenerator(TokenSpace(tokens=4, vocab_size=256), Unconditional(), 32, 1, 2, head=head, token_drop=0.0)
    optimizer, few, new = torch.optim.AdamW(model.parameters(), lr=1e-2), rows(256), rows(256)
    for _ in range(steps):
        loss = model.losses({"ids": few[torch.randint(256, (64,), generator=draw)]}, draw)[0]["token"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval().losses({"ids": new})[0]["token"].item()


def test_learns_from_few_rows_what_a_table_cannot():
    codes, table = held_out(Codes(16, 32)), held_out(Softmax())
    assert codes < 4.3 and codes < table - 1, (codes, table)  # every id equally likely: 5.5
