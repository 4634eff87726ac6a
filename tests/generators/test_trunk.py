"""The trunk against a plain restatement, and its cache: equal to the whole, of the predicted size, never growing."""

import pytest
import torch
import torch.nn.functional as F

from tests.generators.tiny import awake
from tok1d.errors import ModelError
from tok1d.generators.cache import KVCache
from tok1d.generators.trunk import Trunk

pytestmark = pytest.mark.usefixtures("inference")
KINDS = [{}, {"positions": "learned"}, {"positions": "none"}, {"modulated": True}]


@pytest.fixture
def inference():
    """The cache is for inference."""
    with torch.inference_mode():
        yield


def make(length=12, **arguments) -> Trunk:
    torch.manual_seed(0)
    return awake(Trunk(16, 2, length, heads=2, hidden=24, **arguments)).eval()


def plain(trunk: Trunk, x: torch.Tensor, mask: torch.Tensor, vector: torch.Tensor | None) -> torch.Tensor:
    """The same in float64, head by head, with complex rotation; mask (T, T)."""
    w = {name: value.double() for name, value in trunk.state_dict().items()}
    x, length, d = x.double(), x.shape[1], 8

    def rms(y, weight):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(y):
        angle = torch.outer(torch.arange(length).double(), 10000.0 ** -(torch.arange(0, d, 2).double() / d))
        turned = torch.complex(y[..., : d // 2], y[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def modulation(name, chunks):
        if vector is None:
            return [0.0, 0.0, 1.0] * (chunks // 3) if chunks == 6 else [0.0, 0.0]
        return (F.silu(vector.double()) @ w[f"{name}.weight"].T + w[f"{name}.bias"])[:, None].chunk(chunks, -1)

    if trunk.positions is not None:
        x = x + w["positions"][:length]
    for i in range(2):
        b = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(f"{b}modulation", 6)
        q, k, v = ((rms(x, w[f"{b}norm1.weight"]) * (1 + scale1) + shift1) @ w[f"{b}attn.qkv.weight"].T).chunk(3, -1)
        heads = []
        for h in range(2):
            part = slice(h * d, h * d + d)
            a, c = rms(q[..., part], w[f"{b}attn.norm_q.weight"]), rms(k[..., part], w[f"{b}attn.norm_k.weight"])
            if trunk.rotary:
                a, c = turn(a), turn(c)
            score = (a @ c.mT / d**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            heads.append(score @ v[..., part])
        x = x + gate1 * (torch.cat(heads, -1) @ w[f"{b}attn.proj.weight"].T)
        gate, up = ((rms(x, w[f"{b}norm2.weight"]) * (1 + scale2) + shift2) @ w[f"{b}mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + gate2 * ((F.silu(gate) * up) @ w[f"{b}mlp.down.weight"].T)
    shift, scale = modulation("modulation", 2)
    return rms(x, w["norm.weight"]) * (1 + scale) + shift


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_a_plain_restatement(kind, causal):
    trunk, x = make(**kind), torch.randn(3, 9, 16)
    vector = torch.randn(3, 16) if "modulated" in kind else None
    allowed = torch.ones(9, 9, dtype=torch.bool)
    expected = plain(trunk, x, allowed.tril() if causal else allowed, vector)
    torch.testing.assert_close(trunk(x, causal=causal, vector=vector).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_the_whole_however_it_is_cut(kind, padded):
    trunk, x = make(**kind), torch.randn(2, 12, 16)
    vector = torch.randn(2, 16) if "modulated" in kind else None
    keys = torch.tensor([[True, False, False], [True, True, True]]) if padded else None
    mask = None if keys is None else F.pad(keys, (0, 9), value=True)
    whole = trunk(x, causal=True, vector=vector, mask=mask)
    cache = trunk.cache(2, keys=keys)
    store = cache.buffer.data_ptr()
    parts = [trunk(part, causal=True, vector=vector, cache=cache) for part in x.split([4, 1, 1, 3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache.buffer.data_ptr() == store and cache.position == 12


def test_vectors_and_positions_of_their_own_for_each_place():
    trunk, x = make(modulated=True), torch.randn(2, 6, 16)
    vector, order = torch.randn(2, 16), torch.stack([torch.randperm(12)[:6] for _ in range(2)])
    same = trunk(x, vector=vector[:, None].expand(-1, 6, -1), order=order)
    torch.testing.assert_close(same, trunk(x, vector=vector, order=order))
    # without causality, entries may come in any order as long as each keeps its position
    turned = trunk(x.flip(1), vector=vector, order=order.flip(1)).flip(1)
    torch.testing.assert_close(turned, same, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trunk(x, vector=vector, order=torch.arange(6)), trunk(x, vector=vector))


def test_block_causal_masks():
    trunk, x = make(), torch.randn(1, 6, 16)
    block = torch.arange(6) // 3
    mask = (block[:, None] >= block)[None]
    changed = x.clone()
    changed[:, 3:] += 1
    a, b = trunk(x, mask=mask), trunk(changed, mask=mask)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3:], b[:, 3:])
    torch.testing.assert_close(a[:, :3], trunk(x[:, :3]), atol=1e-5, rtol=1e-5)


def test_modulation_starts_as_none_and_shut():
    trunk = Trunk(16, 2, 12, heads=2, modulated=True)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(trunk(x, vector=torch.randn(2, 16)), trunk.norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_cache_is_as_predicted(dtype):
    trunk = make().to(dtype)
    cache = trunk.cache(3, 10)
    assert cache.bytes == KVCache.predicted_bytes(2, 3, 2, 10, 8, dtype) == 2 * 2 * 3 * 2 * 10 * 8 * dtype.itemsize


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heads": 3}, "cannot be split"), ({"heads": 16}, "even width"), ({"positions": "sine"}, "positions must be"), ({"depth": 0}, "depth")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ModelError, match=message):
        Trunk(**{"width": 16, "depth": 1, "length": 4, **arguments})


def test_too_long():
    with pytest.raises(ModelError, match="12 positions, got 13"):
        make()(torch.zeros(1, 13, 16))
