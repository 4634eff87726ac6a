"""The published TiTok family: what is refused, at loading and at export."""

import copy

import pytest
import torch

from tests.golden.read import read
from tests.tokenizers.test_official_titok import BY_NAME, CASES, load
from tok1d.errors import ModelError
from tok1d.tokenizers.official.layout import export_state, load_state
from tok1d.tokenizers.tokenizer import Tokenizer1D


@pytest.mark.parametrize("case", CASES)
def test_one_wrong_tensor_is_refused(case):
    golden = read(case)
    key = "decoder.conv_out.bias" if "decoder.conv_out.bias" in golden.state else "decoder.ffn.2.bias"
    wrong = [
        ({k: v for k, v in golden.state.items() if k != key}, rf"missing \['{key}'\]"),
        ({**golden.state, "decoder.extra": torch.zeros(1)}, r"unexpected \['decoder.extra'\]"),
        ({**golden.state, key: torch.zeros(5)}, rf"{key} has shape \(5,\)"),
    ]
    for state, message in wrong:
        with pytest.raises(ModelError, match=message):
            load_state(BY_NAME[CASES[case]], state, golden.meta["config"], case)


def test_shapes_that_contradict_each_other():
    state = read("titok_vq").state
    wrong = [
        ({k: v for k, v in state.items() if k != "latent_tokens"}, "'latent_tokens' is missing"),
        ({**state, "latent_tokens": torch.zeros(8)}, "2 dimensions"),
        ({**state, "encoder.positional_embedding": torch.zeros(19, 64)}, "no square grid"),
        ({**state, "encoder.positional_embedding": torch.zeros(26, 64)}, "decoder.ffn.0.weight has shape"),
        ({**state, "decoder.positional_embedding": torch.zeros(82, 128)}, "64 pixels, the decoder on 9² patches"),
        ({}, "not a TiTok"),
    ]
    for source, message in wrong:
        with pytest.raises(ModelError, match=message):
            load_state(BY_NAME["titok"], source, {}, "x")
    with pytest.raises(ModelError, match="two-stage TiTok has a codebook"):
        legacy = {k: v for k, v in read("titok_legacy_vq").state.items() if k != "quantize.embedding.weight"}
        load_state(BY_NAME["titok-legacy"], legacy, {}, "x")
    with pytest.raises(ModelError, match="not a maskgit-vqgan state dict"):
        load_state(BY_NAME["maskgit-vqgan"], {"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, {}, "x")


def test_only_published_layouts_are_exported():
    config = load("titok_vq").to_config()
    changes = [
        ("quantizer", {"class": "tok1d.tokenizers.quantizers.fsq.FSQ", "levels": [8] * 16}, "TiTokEncoder × FSQ × GridDecoder"),
        ("encoder", config["encoder"] | {"heads": 2}, "64 wide, these are 32 wide"),
        ("decoder", config["decoder"] | {"mlp_ratio": 2}, "mlp_ratio of 4, this has 2"),
        ("decoder", config["decoder"] | {"tokens": 9}, "makes 8 and takes 9"),
    ]
    for side, part, message in changes:
        other = Tokenizer1D.from_config(copy.deepcopy(config) | {side: part})
        with pytest.raises(ModelError, match=message):
            export_state(BY_NAME["titok"], other)
    with pytest.raises(ModelError, match="the tatitok layout is that of TiTokEncoder × VQ or KL × TextGridDecoder"):
        export_state(BY_NAME["tatitok"], load("titok_vq"))
    with pytest.raises(ModelError, match="the maskgit-vqgan layout is that of"):
        export_state(BY_NAME["maskgit-vqgan"], load("titok_vq"))
    vqgan = load("maskgit_vqgan").to_config()
    for change, message in (({"shortcut": "input"}, "got 'input' and 32"), ({"depth": 1}, "these differ")):
        other = Tokenizer1D.from_config(copy.deepcopy(vqgan) | {"encoder": vqgan["encoder"] | change})
        with pytest.raises(ModelError, match=message):
            export_state(BY_NAME["maskgit-vqgan"], other)
