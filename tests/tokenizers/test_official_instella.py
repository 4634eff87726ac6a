"""Published Instella-T2I tokenizer: its arithmetic written once more and plainly, keys, counts, both directions of the map.

No recorded outputs of it exist here; the plain form below follows the formulas with one layer a weight and one loop a head.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.official.instella import INSTELLA, RoundedNorm, instella_config, spanning_turns
from tok1d.tokenizers.official.layout import export_state, load_state
from tok1d.tokenizers.rotary import rotary_table, rotate
from tok1d.tokenizers.tokenizer import Tokenizer1D

CPU = torch.device("cpu")
TINY = {"tokens": 8, "bits": 6, "dim": 20, "code_dim": 12, "encoder_width": 128, "decoder_width": 64, "mlp_ratio": 2, "image_size": 64}
TINY |= {"encoder_depth": 3, "decoder_depth": 4}


def published_shapes(tokens, bits, dim, code_dim, encoder_width, encoder_depth, decoder_width, decoder_depth, mlp_ratio, head=64, **_):
    """Names and shapes of the published file."""
    shapes = {"quantizer.embed": (bits, code_dim), "quantizer.proj.0.weight": (bits, dim), "quantizer.proj.0.bias": (bits,)}
    e, d = encoder_width, decoder_width
    shapes |= {"encoder.latent_tokens": (1, tokens, e), "encoder.patch_embedder.weight": (e, 3, 16, 16), "encoder.patch_embedder.bias": (e,)}
    shapes |= {"encoder.down_layers.0.conv.weight": (e, e, 3, 3), "encoder.down_layers.0.conv.bias": (e,)}
    shapes |= {"encoder.norm_out.weight": (e,), "encoder.proj_out.weight": (dim, e), "encoder.proj_out.bias": (dim,)}
    shapes |= {"decoder.mask_tokens": (1, 1, d), "decoder.input_layer.0.weight": (code_dim,)}
    shapes |= {"decoder.input_layer.1.weight": (d, code_dim), "decoder.input_layer.1.bias": (d,)}
    shapes |= {"decoder.up_layers.0.conv.weight": (4 * d, d, 3, 3), "decoder.up_layers.0.conv.bias": (4 * d,)}
    shapes |= {"decoder.norm_out.weight": (d,), "to_pixel.weight": (768, d), "to_pixel.bias": (768,)}
    for side, width, depth in (("encoder", e, encoder_depth), ("decoder", d, decoder_depth)):
        for i in range(depth):
            block = f"{side}.transformer_blocks.{i}."
            shapes |= {f"{block}{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
            shapes |= {f"{block}attn.{x}_proj.weight": (width, width) for x in "qkvo"}
            shapes |= {f"{block}attn.norm_{x}.weight": (head,) for x in "qk"}
            shapes |= {f"{block}mlp.{x}_proj.weight": (mlp_ratio * width, width) for x in ("gate", "up")}
            shapes |= {f"{block}mlp.down_proj.weight": (width, mlp_ratio * width)}
    return shapes


def random_state(**sizes) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in published_shapes(**{**TINY, **sizes}).items():
        value = torch.randn(shape, generator=rng)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        state[key] = 1 + 0.3 * value if "norm" in key or "input_layer.0" in key else value * (0.2 if len(shape) == 1 else fan_in**-0.5)
    return state


# the published arithmetic, plainly -------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rope_vectors(latents: int, rows: int, cols: int, scale: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 64 channels at every position; ids are (i, 0, 0) and (0, h', w')."""
    ids = [(float(i), 0.0, 0.0) for i in range(latents)]
    for h in range(rows):
        for w in range(cols):
            ids.append((0.0, h / (rows - 1) * (scale - 1), w / (cols - 1) * (scale - 1)))
    angles = []
    for triple in ids:
        one = []
        for position, dim in zip(triple, (8, 28, 28)):
            for i in range(dim // 2):
                one += [position * 10000 ** (-2 * i / dim)] * 2
        angles.append(one)
    table = torch.tensor(angles, dtype=torch.float64)
    return table.cos().float(), table.sin().float()


def attention(state: dict, at: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = (x @ state[f"{at}{name}_proj.weight"].T for name in "qkv")
    outputs = []
    for start in range(0, x.shape[-1], 64):
        part = slice(start, start + 64)
        qh, kh = norm(q[..., part], state[f"{at}norm_q.weight"]), norm(k[..., part], state[f"{at}norm_k.weight"])
        qh, kh = (y * cos + torch.cat([-y[..., 32:], y[..., :32]], -1) * sin for y in (qh, kh))
        outputs.append((qh @ kh.transpose(1, 2) / 8).softmax(-1) @ v[..., part])
    return torch.cat(outputs, -1) @ state[f"{at}o_proj.weight"].T


def run_blocks(state: dict, side: str, numbers: range, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    for i in numbers:
        at = f"{side}.transformer_blocks.{i}."
        x = x + attention(state, f"{at}attn.", norm(x, state[f"{at}input_layernorm.weight"]), cos, sin)
        y = norm(x, state[f"{at}post_attention_layernorm.weight"])
        gate, up = y @ state[f"{at}mlp.gate_proj.weight"].T, y @ state[f"{at}mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ state[f"{at}mlp.down_proj.weight"].T
    return x


def plain_encode(state: dict, images: Tensor, first: int, depth: int) -> Tensor:
    x = F.conv2d(images * 2 - 1, state["encoder.patch_embedder.weight"], state["encoder.patch_embedder.bias"], stride=16)
    (batch, width, rows, cols), n = x.shape, state["encoder.latent_tokens"].shape[1]
    x = torch.cat([state["encoder.latent_tokens"].repeat(batch, 1, 1), x.flatten(2).transpose(1, 2)], 1)
    x = run_blocks(state, "encoder", range(first), x, *rope_vectors(n, rows, cols, 64))
    grid = x[:, n:].transpose(1, 2).reshape(batch, width, rows, cols)
    conv = F.conv2d(grid, state["encoder.down_layers.0.conv.weight"], state["encoder.down_layers.0.conv.bias"], stride=2, padding=1)
    shortcut = F.pixel_unshuffle(grid, 2).unflatten(1, (width, 4)).mean(2)
    x = torch.cat([x[:, :n], (conv + shortcut).flatten(2).transpose(1, 2)], 1)
    x = run_blocks(state, "encoder", range(first, depth), x, *rope_vectors(n, rows // 2, cols // 2, 32))
    return norm(x[:, :n], state["encoder.norm_out.weight"]) @ state["encoder.proj_out.weight"].T + state["encoder.proj_out.bias"]


def plain_bits(state: dict, z: Tensor) -> Tensor:
    return ((z @ state["quantizer.proj.0.weight"].T + state["quantizer.proj.0.bias"]).sigmoid() > 0.5).float()


def plain_decode(state: dict, bits: Tensor, rows: int, cols: int, first: int, depth: int) -> Tensor:
    """Rows and columns of patches of 16 pixels → image in [0, 1], not clamped."""
    x = norm(bits @ state["quantizer.embed"], state["decoder.input_layer.0.weight"])
    x = x @ state["decoder.input_layer.1.weight"].T + state["decoder.input_layer.1.bias"]
    batch, n, width = x.shape
    x = torch.cat([x, state["decoder.mask_tokens"].repeat(batch, rows * cols // 4, 1)], 1)
    x = run_blocks(state, "decoder", range(first), x, *rope_vectors(n, rows // 2, cols // 2, 32))
    grid = x[:, n:].transpose(1, 2).reshape(batch, width, rows // 2, cols // 2)
    conv = F.conv2d(grid, state["decoder.up_layers.0.conv.weight"], state["decoder.up_layers.0.conv.bias"], padding=1)
    fine = F.pixel_shuffle(conv, 2) + F.interpolate(grid, scale_factor=2, mode="nearest")
    x = torch.cat([x[:, :n], fine.flatten(2).transpose(1, 2)], 1)
    x = run_blocks(state, "decoder", range(first, depth), x, *rope_vectors(n, rows, cols, 64))
    x = norm(x[:, n:], state["decoder.norm_out.weight"]) @ state["to_pixel.weight"].T + state["to_pixel.bias"]
    x = x.view(batch, rows, cols, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, rows * 16, cols * 16)
    return x / 2 + 0.5


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def tokenizer(state) -> Tokenizer1D:
    return load_state(INSTELLA, state, {}, "tiny")


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 64)])
def test_equals_the_plain_form(state, tokenizer, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    z, wanted = tokenizer.encode_latents(images), plain_encode(state, images, 2, 3)
    torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-5)
    seq, bits = tokenizer.encode(images), plain_bits(state, wanted)
    assert torch.equal(tokenizer.quantizer(z).ids, (bits.long() << torch.arange(5, -1, -1)).sum(-1)) and 0.2 < bits.mean() < 0.8
    picture = plain_decode(state, bits, size[0] // 16, size[1] // 16, 2, 4)
    assert picture.std() > 0.1
    q = tokenizer.quantizer.ids_to_codes(seq.ids)
    torch.testing.assert_close(tokenizer.decode_latents(q, size=size), picture, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokenizer.decode(seq), picture.clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_positions_matter_to_the_plain_form(state, tokenizer):
    """A model of the same weights with true rotations is another model: the comparison above would notice."""
    config = tokenizer.to_config()
    config["encoder"]["class"] = "tok1d.tokenizers.encoders.binary.BinaryEncoder"
    other = Tokenizer1D.from_config(config).eval()
    other.load_state_dict(tokenizer.state_dict())
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert (other.encode_latents(images) - plain_encode(state, images, 2, 3)).abs().max() > 1e-2


# positions and norms ---------------------------------------------------------------------------------------------


def test_two_by_two_grid_by_hand():
    """Heads of 8 channels, axes of 4, 2 and 2, one latent and patches at 0 and 63: neighbours share an angle, halves are mixed."""
    turn = spanning_turns(2, (2, 2), (4, 2, 2), 64, torch.float32, CPU)
    by_hand = [[0] * 8, [1, 1, 0.01, 0.01, 0, 0, 0, 0]]
    by_hand += [[0, 0, 0, 0, y, y, x, x] for y in (0, 63) for x in (0, 63)]
    torch.testing.assert_close(turn, torch.tensor(by_hand, dtype=torch.float64))
    x = torch.arange(1.0, 9).expand(1, 6, 1, 8)
    rotated = rotate(x, rotary_table(spanning_turns, 2, (2, 2), (4, 2, 2), 64, torch.float32, device=CPU))[0, :, 0]
    c, s = math.cos(63), math.sin(63)
    at_63_0 = [1, 2, 3, 4, 5 * c + 1 * s, 6 * c + 2 * s, 7, 8]  # x₁ sees angle 0, x₂ sees y, y, 0, 0
    torch.testing.assert_close(rotated[4], torch.tensor(at_63_0, dtype=torch.float32))
    torch.testing.assert_close(rotated[0], torch.arange(1.0, 9))
    assert abs(rotated[4].norm() - x[0, 0].norm()) > 0.1, "it is no rotation"


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_every_size_spans_the_same_positions(tokenizer, side):
    for span, n in ((64, side // 16), (32, side // 32)):
        y = spanning_turns(3, (n, 2), (2, 2, 2), span, torch.float32, CPU)[3::2, 2]  # frequency 1: the angle is the position
        torch.testing.assert_close(y, torch.linspace(0, span - 1, n, dtype=torch.float64), atol=1e-5, rtol=1e-6)
    encoder, decoder, grid = tokenizer.encoder, tokenizer.decoder, (side // 16, 4)
    wanted = [rotary_table(spanning_turns, 8, grid, (8, 28, 28), span, torch.float32, device=CPU) for span in (64, 32)]
    for merges in (0, 1):
        assert torch.equal(encoder.table(grid, merges), wanted[merges]) and torch.equal(decoder.table(8, grid, merges), wanted[merges])


def test_one_row_of_patches_is_at_zero():
    turn = spanning_turns(0, (1, 3), (2, 2, 2), 64, torch.float32, CPU)
    assert (turn[:, 2] == 0).all() and turn[:, 4].tolist() == [0, 31.5, 63]


def test_positions_are_rounded_to_the_precision_of_the_weights(tokenizer):
    def y(dtype: torch.dtype) -> Tensor:
        return spanning_turns(0, (32, 1), (2, 2, 2), 64, dtype, CPU)[:, 2]

    exact = torch.arange(32, dtype=torch.float32) / 31 * 63
    assert torch.equal(y(torch.bfloat16), exact.bfloat16().double()) and (y(torch.bfloat16) - y(torch.float32)).abs().max() > 0.05
    half = copy.deepcopy(tokenizer).to(torch.bfloat16)
    for part, table in ((half.encoder, half.encoder.table((6, 6), 0)), (half.decoder, half.decoder.table(8, (6, 6), 0))):
        rounded = rotary_table(spanning_turns, 8, (6, 6), part.axes, 64, torch.bfloat16, device=CPU)
        assert torch.equal(table, rounded) and table.dtype == torch.float32
    assert half.decode(half.encode(torch.rand(1, 3, 64, 64))).isfinite().all()


def test_norm_rounds_before_the_weight():
    layer = RoundedNorm(64).to(torch.bfloat16)
    layer.weight.data = 1 + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    by_hand = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), by_hand.bfloat16() * layer.weight)
    assert not torch.equal(layer(x), (by_hand * layer.weight.float()).bfloat16())


# the published file ----------------------------------------------------------------------------------------------


def test_published_names_and_counts():
    with torch.device("meta"):
        tokenizer = Tokenizer1D.from_config(instella_config())
    exported = export_state(INSTELLA, tokenizer)
    shapes = {key: tuple(value.shape) for key, value in exported.items()}
    sizes = {"tokens": 128, "bits": 64, "dim": 768, "code_dim": 768, "encoder_width": 768, "encoder_depth": 12}
    assert shapes == published_shapes(**sizes, decoder_width=1024, decoder_depth=16, mlp_ratio=4) and len(shapes) == 328
    counts = dict.fromkeys(("encoder", "decoder", "quantizer", "to_pixel"), 0)
    for key, value in exported.items():
        counts[key.partition(".")[0]] += value.numel()
    millions = {part: round(count / 1e6, 3 if count < 1e6 else 2) for part, count in counts.items()}
    assert millions == {"encoder": 119.86, "decoder": 307.01, "quantizer": 0.098, "to_pixel": 0.787}
    assert sum(counts.values()) == sum(p.numel() for p in tokenizer.parameters())
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    assert encoder.merge_after == decoder.split_after == (8,) and encoder.axes == decoder.axes == (8, 28, 28)
    assert encoder.size_step == 32 and encoder.size_limit == decoder.size_limit == 1024 and tokenizer.bits_per_token == 64
    assert INSTELLA.recognises(shapes)
    with torch.device("meta"):  # what the shapes say is what they were made with
        assert Tokenizer1D.from_config(INSTELLA.config(shapes, {}, "instella-t2i")).to_config() == tokenizer.to_config()


def test_both_directions_bit_for_bit(state, tokenizer):
    exported = export_state(INSTELLA, tokenizer)
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert exported[key].shape == value.shape and torch.equal(exported[key], value), key
    again = load_state(INSTELLA, exported, {}, "tiny")
    assert again.to_config() == tokenizer.to_config() and again.model_id == tokenizer.model_id
    assert not tokenizer.training and tokenizer.encoder.merge_after == tokenizer.decoder.split_after == (2,)


def test_our_folder_holds_the_same_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer1D.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 96)
    assert again.model_id == tokenizer.model_id and torch.equal(again(images).reconstruction, tokenizer(images).reconstruction)


def test_other_sizes_are_inferred():
    state = random_state(tokens=5, bits=64, dim=7, code_dim=64, encoder_depth=6, head=32, mlp_ratio=3)
    tokenizer = load_state(INSTELLA, state, {}, "other")
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    assert (encoder.tokens, encoder.dim, len(encoder.blocks), encoder.merge_after) == (5, 7, 6, (4,))
    assert encoder.blocks[0].attn.heads == 4 and decoder.blocks[0].attn.heads == 2 and decoder.dim == 64
    picture = tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 32, 64)))
    assert picture.shape == (1, 3, 32, 64) and picture.isfinite().all()


def test_what_is_refused(state):
    wrong = [
        ({**state, "decoder.extra": torch.zeros(1)}, "unexpected \\['decoder.extra'\\]"),
        ({k: v for k, v in state.items() if k != "decoder.norm_out.weight"}, "missing \\['decoder.norm_out.weight'\\]"),
        ({k: v for k, v in state.items() if k != "encoder.latent_tokens"}, "'encoder.latent_tokens' is missing"),
        ({**state, "encoder.latent_tokens": torch.zeros(8)}, "3 dimensions"),
        ({**state, "encoder.transformer_blocks.1.attn.q_proj.weight": torch.zeros(3, 3)}, "q_proj.weight has shape \\(3, 3\\)"),
        ({**state, "encoder.transformer_blocks.0.attn.norm_q.weight": torch.zeros(48)}, "heads of 48 channels do not divide"),
        ({**state, "decoder.mask_tokens": torch.zeros(1).expand(1, 1, 10**9)}, "do not divide|must be an integer"),
    ]
    for source, message in wrong:
        with pytest.raises(ModelError, match=message):
            load_state(INSTELLA, source, {}, "x")
    assert INSTELLA.recognises(state) and not INSTELLA.recognises({"latent_tokens": (32, 64), "quantizer.embed": (1, 1)})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("encoder", {"class": "tok1d.tokenizers.encoders.binary.BinaryEncoder"}, "BinaryEncoder × BernoulliBits × InstellaDecoder"),
        ("quantizer", {"class": "tok1d.tokenizers.quantizers.fsq.FSQ", "levels": [8] * 20}, "InstellaEncoder × FSQ × InstellaDecoder"),
        ("encoder", {"merge_after": [1]}, "does not tell merge_after: readers assume \\[2\\], here it is \\[1\\]"),
        ("decoder", {"split_after": [3]}, "split_after"),
        ("encoder", {"size_limit": 512}, "size_limit of the encoder: readers assume 1024"),
        ("decoder", {"mlp_ratio": 3}, "mlp_ratio of the decoder"),
    ],
)
def test_only_the_published_layout_is_exported(tokenizer, part, change, message):
    config = tokenizer.to_config()
    config[part] = {**({} if "levels" in change else config[part]), **change}
    if "levels" in change:
        config["decoder"]["dim"] = 20
    with pytest.raises(ModelError, match=message):
        export_state(INSTELLA, Tokenizer1D.from_config(config))
