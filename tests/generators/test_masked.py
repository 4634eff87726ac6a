"""Masked generation: schedules, steps, losses, lengths, seeds, what is known, guidance, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from tests.generators import tiny
from tok1d.errors import MissingExtraError, ModelError, TokenError
from tok1d.extras import require
from tok1d.generators.chance import Chance
from tok1d.generators.condition import ClassCondition, Condition, Given, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.guidance import combine, strengths
from tok1d.generators.heads import Softmax
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.masked_bert import BertBody
from tok1d.generators.masked_body import TrunkBody
from tok1d.generators.masked_codes import CodesBody
from tok1d.generators.masked_steps import gumbel, pick, settle, still_masked
from tok1d.generators.masked_uvit import UViTBody
from tok1d.generators.sampling import choose, uniforms
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.code_books import CodeBooks


def knowing(**sizes: int) -> CodesBody:
    """A body that knows the codes of 8 tokens."""
    body = CodesBody(**sizes, features=6, inner=8)
    body.take(CodeBooks.of(tiny.nested(), 8))
    return body


BODIES = {"trunk": TrunkBody, "bert": BertBody, "uvit": UViTBody, "codes": knowing}
each_body = pytest.mark.parametrize("body", BODIES)


def masked(body: str = "trunk", condition: Condition | None = None, space: TokenSpace = tiny.IDS, **arguments) -> MaskedGenerator:
    """An awake model in eval mode: 8 tokens, 3 classes."""
    torch.manual_seed(0)
    model = MaskedGenerator(space, condition or ClassCondition(3), BODIES[body](width=32, depth=2, heads=2), **arguments)
    return tiny.awake(model).eval()


class Padded(Condition):
    """Three places, of which the last counts for nothing."""

    places = 3

    def attach(self, width, tokens=True, vector=False):
        self.states = nn.Parameter(torch.randn(3, width))

    def request(self, rows, label=None, text=None):
        return {}

    def forward(self, batch, rows, chance=None):
        mask = torch.tensor([True, True, False]).expand(rows, -1)
        return Given(self.states.expand(rows, -1, -1), self.states[0].expand(rows, -1), mask)

    def null(self, rows):
        return None


# steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["arccos", "cosine", "linear"])
@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1, 5), (16, 6), (32, 8), (256, 64), (7, 20), (0, 3)])
def test_how_many_stay_masked(masking, tokens, steps):
    counts = still_masked(tokens, steps, masking)
    share = {"arccos": lambda r: math.acos(r) / (math.pi / 2), "cosine": lambda r: math.cos(r * math.pi / 2), "linear": lambda r: 1 - r}
    left, wanted = tokens, []
    for step in range(1, steps + 1):
        left = min(left, max(1, min(left - 1, math.floor(tokens * share[masking](step / steps))))) if step < steps else 0
        wanted.append(left)
    assert counts == wanted and len(counts) == steps and counts[-1] == 0
    assert all(a >= b for a, b in zip([tokens, *counts], counts))
    assert all(a > b or a <= 1 for a, b in zip([tokens, *counts], counts))


def test_tokens_are_drawn_from_the_softmax_at_a_temperature():
    logits = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0)) * 3
    wanted = (logits[0, 0].double() / 2.5).softmax(-1)
    rows = 5000
    many = logits.expand(1, rows, 5)
    even = ((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)[None]
    share = torch.bincount(pick(many, even, 2.5)[0], minlength=5) / rows
    torch.testing.assert_close(share.double(), wanted, atol=1e-3, rtol=0)
    noise = torch.rand(1, rows, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = torch.bincount(pick(many, noise, 2.5)[0], minlength=5) / rows  # the published way draws from the same distribution
    torch.testing.assert_close(share.double(), wanted, atol=5 * math.sqrt(0.25 / rows), rtol=0)
    assert (pick(many, even, 0.0) == logits.argmax()).all()
    assert gumbel(torch.tensor([0.0, 1 - 1e-9, 0.5], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_step_equals_the_amused_scheduler_of_diffusers(schedule):
    """Its tokens are drawn at temperature 1, its order at another, and it is sure of log-probabilities: log-softmax as logits."""
    try:
        amused = require("diffusers.schedulers.scheduling_amused", "flow")
    except MissingExtraError as error:
        pytest.skip(str(error))
    scheduler = amused.AmusedScheduler(mask_token_id=16, masking_schedule=schedule)
    steps, rows, tokens = 5, 3, 12
    scheduler.set_timesteps(steps, temperature=(4, 0))
    draw = torch.Generator().manual_seed(3)
    ids, hidden = torch.zeros(rows, tokens, dtype=torch.int64), torch.ones(rows, tokens, dtype=torch.bool)
    counts = still_masked(tokens, steps, schedule)
    places = torch.arange(tokens).expand(rows, -1)
    for step, timestep in enumerate(scheduler.timesteps):
        logits = torch.randn(rows, tokens, 16, generator=draw) * 2
        sample = ids.masked_fill(hidden, 16)
        state = draw.get_state()
        theirs = scheduler.step(logits, timestep, sample, generator=draw)
        draw.set_state(state)
        torch.multinomial(logits.softmax(-1).view(-1, 16), 1, generator=draw)
        sure = torch.zeros(rows, tokens).uniform_(0, 1, generator=draw)
        # the middle of the interval in which the inverse of the distribution gives the token that they drew
        total = logits.double().softmax(-1).cumsum(-1)
        drawn = theirs.pred_original_sample[..., None]
        uniform = (total - logits.double().softmax(-1) / 2).gather(-1, drawn).squeeze(-1)
        left = torch.full((rows,), counts[step])
        temperature = float(scheduler.temperatures[step])
        ids, hidden = settle(logits.log_softmax(-1), ids, hidden, places, left, (uniform, sure), temperature, id_temperature=1.0)
        assert torch.equal(ids, theirs.pred_original_sample)
        assert torch.equal(ids.masked_fill(hidden, 16), theirs.prev_sample)
    assert not hidden.any()


# sampling ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def plain(model, label, seeds, steps, guidance, schedule, temperature, annealing=False):
    """Two forwards a step over all places, in the words of the published code, row by row."""
    rows, n, k = len(label), model.space.tokens, model.space.vocab_size
    given, null = model.condition({"label": torch.tensor(label)}, rows), model.condition.null(rows)
    ids, g, noise = torch.full((rows, n), k), strengths(guidance, schedule, steps), uniforms(seeds, 2, steps, n)
    for step in range(steps):
        r = (step + 1) / steps
        t = temperature * (1 - r)
        c, u = (model.body.logits(model.body(ids, side)) for side in (given, null))
        logits = combine(c, u, g[step])
        if annealing:
            logits = logits / (0.5 + 0.8 * (1 - r))
        for row in range(rows):
            known = ids[row] != k
            drawn = choose(logits[row], noise[row, 0, step], t)
            sure = logits[row].gather(1, drawn[:, None])[:, 0] - t * torch.log(-torch.log(noise[row, 1, step]))
            drawn = torch.where(known, ids[row], drawn)
            if step + 1 < steps:
                count = max(1, min(int((~known).sum()) - 1, math.floor(n * math.acos(r) / (math.pi / 2))))
                drawn[sure.masked_fill(known, math.inf).argsort()[:count]] = k
            ids[row] = drawn
    return ids


@each_body
@pytest.mark.parametrize(("schedule", "annealing"), [("linear", True), ("constant", False), ("power_cosine(2)", True)])
def test_one_batched_forward_a_step_makes_the_tokens_of_two(body, schedule, annealing, monkeypatch):
    model, calls = masked(body), []
    wanted = plain(model, [0, 2], [5, 6], 5, 3.0, schedule, 2.0, annealing)
    forward = model.body.forward
    monkeypatch.setattr(model.body, "forward", lambda ids, *rest: calls.append(len(ids)) or forward(ids, *rest))
    options = {"steps": 5, "guidance": 3.0, "schedule": schedule, "temperature": 2.0, "annealing": annealing}
    made = model.generate(2, label=[0, 2], seeds=5, **options)
    assert torch.equal(made.ids, wanted)
    assert calls == [4 if g != 1 else 2 for g in strengths(3.0, schedule, 5)]
    assert not torch.equal(model.generate(2, label=[2, 0], seeds=5, **options).ids, wanted)


@each_body
def test_a_row_is_the_same_alone_and_in_any_batch(body):
    model = masked(body)
    options = {"guidance": 2.0, "temperature": 3.0, "steps": 4}
    many = model.generate(5, label=[0, 1, 2, 1, 0], seeds=[9, 8, 7, 8, 1], **options)
    for i, (label, seed) in enumerate([(0, 9), (1, 8), (2, 7), (1, 8), (0, 1)]):
        assert torch.equal(model.generate(1, label=label, seeds=[seed], **options).ids[0], many.ids[i])
    assert torch.equal(many.ids[1], many.ids[3]) and not torch.equal(many.ids[0], many.ids[4])


def test_known_tokens_are_kept_wherever_they_are():
    model = masked()
    options = {"label": [0, 1], "seeds": 4, "guidance": 2.0, "steps": 3}
    ids = tiny.tokens(model.space, 2)
    made = model.generate(2, prefix=ids[:, :5], **options)
    assert torch.equal(made.ids[:, :5], ids[:, :5]) and made.shape == (2, 8)
    keep = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]).bool()  # another number in each row
    made = model.generate(2, prefix=ids, keep=keep, **options)
    assert torch.equal(made.ids[keep], ids[keep]) and not torch.equal(made.ids[~keep], ids[~keep])
    alone = model.generate(1, prefix=ids[1:], keep=keep[1], label=1, seeds=5, guidance=2.0, steps=3)
    assert torch.equal(alone.ids[0], made.ids[1])
    changed = torch.where(keep, ids, (ids + 1) % 16)  # what is not kept means nothing
    assert torch.equal(model.generate(2, prefix=changed, keep=keep, **options).ids, made.ids)
    assert torch.equal(model.generate(2, prefix=ids, **options).ids, ids)
    rows = torch.tensor([[True] * 8, [False] * 8])  # nothing to do in one row
    made = model.generate(2, prefix=ids, keep=rows, **options)
    assert torch.equal(made.ids[0], ids[0]) and not torch.equal(made.ids[1], ids[1])
    assert torch.equal(made.ids[1], model.generate(1, label=1, seeds=5, guidance=2.0, steps=3).ids[0])


def test_steps_are_reported_with_guesses_for_all_tokens():
    seen = []
    made = masked().generate(2, label=0, tokens=5, steps=3, on_step=lambda *x: seen.append(x))
    assert [x[:2] for x in seen] == [(0, 3), (1, 3), (2, 3)] and torch.equal(seen[-1][2], made.ids)
    assert all(x[2].shape == (2, 5) and x[2].min() >= 0 and x[2].max() < 16 for x in seen)
    assert made.nested and masked(condition=Unconditional()).generate(3, tokens=1, steps=9).shape == (3, 1)


# lengths -------------------------------------------------------------------------------------------------------------


@each_body
@pytest.mark.parametrize("condition", [ClassCondition, Unconditional, Padded])
@torch.inference_mode()
def test_what_lies_beyond_the_end_is_dropped_not_masked(body, condition):
    model = masked(body, condition(3) if condition is ClassCondition else condition())
    ids, given = tiny.tokens(model.space, 2), model.condition({"label": torch.tensor([0, 1])}, 2)
    hidden = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = torch.arange(8) < torch.tensor([[5], [3]])
    whole = model.logits(ids, hidden, given, kept)
    for row, k in ((0, 5), (1, 3)):
        one = Given(*(None if x is None else x[row : row + 1] for x in (given.tokens, given.vector, given.mask)))
        short = model.logits(ids[row : row + 1, :k], hidden[row : row + 1, :k], one)
        torch.testing.assert_close(whole[row, :k], short[0], atol=1e-5, rtol=1e-5)
    if condition is Padded:
        before = model.logits(ids, hidden, given)
        model.condition.states[2] *= -1
        again = model.logits(ids, hidden, model.condition({}, 2))
        torch.testing.assert_close(again, before, atol=1e-6, rtol=0)
        model.condition.states[1] *= -1
        assert not torch.allclose(model.logits(ids, hidden, model.condition({}, 2)), before, atol=1e-3)


def test_masks_of_training():
    model = masked()
    lengths = torch.full((4000,), 8)
    lengths[::2] = 3
    for masking, mean in (("arccos", 2 / math.pi), ("cosine", 2 / math.pi), ("linear", 0.5)):
        model.masking = masking
        mask = model.draw_mask(lengths, 8, Chance(4000, torch.Generator().manual_seed(0)))
        assert not mask[::2, 3:].any() and mask.any(1).all()
        for k in (3, 8):
            share = mask[lengths == k][:, :k].double().mean()
            # rounding is fair but for the ends: at least one of k is masked
            assert abs(share - mean) < 0.02 + (0.08 if k == 3 else 0.02), (masking, k)
        assert (mask[1::2].double().mean(0) - mask[1::2].double().mean()).abs().max() < 0.03  # no place is preferred
    draw = torch.Generator().manual_seed(5)
    mask = model.draw_mask(torch.tensor([8] * 6), 8, Chance(6, draw))
    u = torch.rand(6, generator=draw.manual_seed(5))
    assert torch.equal(mask.sum(1), (8 * (1 - u)).round().clamp(min=1).long())


# training ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_mean():
    model = masked()
    ids, label, lengths = tiny.tokens(model.space, 3), torch.tensor([0, 2, -1]), torch.tensor([8, 3, 1])
    losses, stats = model.losses({"ids": ids, "label": label, "lengths": lengths}, torch.Generator().manual_seed(1))
    hidden = model.draw_mask(lengths, 8, Chance(3, torch.Generator().manual_seed(1)))
    given, total, weights, right = model.condition({"label": label}, 3), 0.0, 0.0, 0
    for i, k in enumerate(lengths.tolist()):
        one = Given(given.tokens[i : i + 1])
        logits = model.logits(ids[i : i + 1, :k], hidden[i : i + 1, :k], one)[0]
        log = logits.log_softmax(-1)
        nats = -0.9 * log.gather(1, ids[i, :k, None])[:, 0] - 0.1 * log.mean(1)
        weight = torch.where(hidden[i, :k], 1.0, 0.1)
        total, weights = total + (nats * weight).sum(), weights + weight.sum()
        right += int(((logits.argmax(-1) == ids[i, :k]) & hidden[i, :k]).sum())
    torch.testing.assert_close(losses["token"], total / weights)
    torch.testing.assert_close(stats["accuracy"], torch.tensor(right / int(hidden.sum())))
    torch.testing.assert_close(stats["masked"], torch.tensor(int(hidden.sum()) / 12))
    padded = ids.masked_fill(torch.arange(8) >= lengths[:, None], 0)
    again = model.losses({"ids": padded, "label": label, "lengths": lengths}, torch.Generator().manual_seed(1))[0]
    torch.testing.assert_close(again["token"], losses["token"])


def test_training_draws_from_the_generator_alone(monkeypatch):
    from tok1d.generators import chance
    from tok1d.generators import masked as module

    model = masked(condition=ClassCondition(3, drop=0.5), distribution="powers_of_two").train()
    batch = {"ids": tiny.tokens(model.space, 16), "label": torch.arange(16) % 3}

    def loss(seed, rank=0, world=1, rows=slice(16)):
        monkeypatch.setattr(chance, "world", lambda: (rank, world))
        part = {k: v[rows] for k, v in batch.items()}
        return model.losses(part, torch.Generator().manual_seed(seed))[0]["token"]

    assert torch.equal(loss(1), loss(1)) and len({loss(s).item() for s in range(4)}) == 4
    halves, whole = [], model.losses(batch, torch.Generator().manual_seed(2))[0]["token"]
    sums = []
    monkeypatch.setattr(module, "sum_over_ranks", lambda x: sums.append(x) or x)  # each rank alone: weights of its own rows
    for rank in range(2):
        halves.append(loss(2, rank, 2, slice(8 * rank, 8 * rank + 8)))
    torch.testing.assert_close((halves[0] * sums[0] + halves[1] * sums[1]) / sum(sums), whole)
    model.eval()  # classes stay, masks are drawn
    assert model.losses(batch, torch.Generator().manual_seed(1))[0]["token"] != loss(2)


@each_body
def test_every_parameter_learns(body):
    model = masked(body).train()
    model.losses({"ids": tiny.tokens(model.space, 32), "label": torch.arange(32) % 3}, torch.Generator().manual_seed(0))[0]["token"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("body", ["bert", "uvit"])
def test_dropout_is_of_training_only(body):
    model = MaskedGenerator(tiny.IDS, ClassCondition(3), BODIES[body](width=32, depth=2, heads=2, dropout=0.5))
    tiny.awake(model)
    batch = {"ids": tiny.tokens(model.space, 4), "label": torch.zeros(4, dtype=torch.int64)}

    def loss():
        return model.losses(batch, torch.Generator().manual_seed(0))[0]["token"].item()

    model.train()
    assert loss() != loss()
    model.eval()
    assert loss() == loss()


def test_samples_obey_the_class_they_were_trained_for():
    """Rows of class c count up by c + 1 from any first token: every token must fit all others."""
    torch.manual_seed(0)
    space = TokenSpace(tokens=6, vocab_size=6)
    model = MaskedGenerator(space, ClassCondition(2), TrunkBody(width=32, depth=2, heads=2), label_smoothing=0.0)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    for _ in range(120):
        first, label = torch.randint(6, (48,), generator=draw), torch.randint(2, (48,), generator=draw)
        ids = (first[:, None] + (1 + 4 * label)[:, None] * torch.arange(6)) % 6
        optimizer.zero_grad()
        model.losses({"ids": ids, "label": label}, draw)[0]["token"].backward()
        optimizer.step()
    label = torch.arange(60) % 2
    made = model.eval().generate(60, label=label, temperature=1.0, steps=6).ids
    wanted = (made[:, :1] + (1 + 4 * label)[:, None] * torch.arange(6)) % 6
    assert (made == wanted).all(1).float().mean() > 0.7  # by chance: one in 7,776
    assert len(made[:, 0].unique()) >= 5


# folders and refusals ------------------------------------------------------------------------------------------------


@each_body
def test_what_is_saved_comes_back(body, tmp_path):
    model = masked(body, distribution="uniform")
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert type(back.body) is type(model.body) and back.model_id == model.model_id
    made, again = (m.generate(2, label=1, guidance=2.0, tokens=5) for m in (model, back))
    assert torch.equal(made.ids, again.ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 3}, "classes are 0 to 2"),
        ({"label": 0, "tokens": 9}, "rows of 1 to 8 tokens"),
        ({"label": 0, "top_k": 5}, "has no option 'top_k'; its options: guidance, schedule, temperature, steps, annealing"),
        ({"label": 0, "steps": 0}, "steps must be an integer in 1"),
        ({"label": 0, "masking": "sine"}, "masking must be one of arccos, cosine, linear, got 'sine'"),
        ({"label": 0, "annealing": 1}, "annealing must be true or false"),
        ({"label": 0, "keep": [True]}, "give prefix= as well"),
        ({"label": 0, "prefix": torch.zeros(1, 3, dtype=torch.int64), "keep": torch.ones(2)}, r"keep must be bool \(3,\) or \(2, 3\)"),
        ({"label": 0, "prefix": torch.tensor([[16]])}, "another model made them"),
        ({"label": 0, "temperature": -1.0}, "temperature"),
    ],
)
def test_what_sampling_refuses(options, message):
    with pytest.raises(TokenError, match=message):
        masked().generate(2, **options)


def test_what_training_refuses():
    model = masked()
    ids, label = tiny.tokens(model.space, 2), torch.tensor([0, 1])
    with pytest.raises(TokenError, match="another model made them"):
        model.losses({"ids": ids + 16, "label": label})
    for lengths in ([0, 8], [1, 9]):
        with pytest.raises(TokenError, match=r"lengths must be in 1\.\.8"):
            model.losses({"ids": ids, "label": label, "lengths": torch.tensor(lengths)})
    with pytest.raises(TokenError, match=r"lengths must be \(2,\)"):
        model.losses({"ids": ids, "label": label, "lengths": torch.tensor([3])})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"space": tiny.WIDE}, ModelError, "has a logit for each of up to 1048576 ids, tokenizer has bits"),
        ({"space": TokenSpace(tokens=4, vocab_size=16), "distribution": "uniform"}, ModelError, "needs several lengths"),
        ({"masking": "sine"}, TokenError, "masking must be one of"),
        ({"label_smoothing": 2.0}, TokenError, "label_smoothing must be a probability"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        masked(**arguments)


def test_bad_bodies():
    with pytest.raises(ModelError, match="body must be a MaskedBody, got Softmax"):
        MaskedGenerator(tiny.IDS, ClassCondition(3), Softmax())
    with pytest.raises(ModelError, match="even, got 3"):
        UViTBody(32, 3, 2)
    with pytest.raises(ModelError, match="cannot be split into 5 heads"):
        BertBody(32, 2, 5)
    with pytest.raises(ModelError, match="depth must be an integer"):
        BertBody(32, 0, 2)
