"""Published files: what is found in them, what is unwrapped, and what hostile ones achieve (nothing)."""

import argparse
import collections
import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file

import tok1d
from tests.published import CASES, publish, tree
from tok1d.errors import ModelError
from tok1d.tokenizers.official import NAMES, layout_named, layouts, overridden, recognise
from tok1d.tokenizers.official.interpolate import interpolate
from tok1d.tokenizers.official.read import read, read_pickle

STATE = {"a.weight": torch.arange(4.0), "b": torch.ones(2, 3)}


def same(found, wanted=STATE):
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    return True


# what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_each_family_is_recognised_and_no_other(case, tmp_path):
    publish(case, tmp_path)
    shapes = read(tmp_path).shapes
    assert recognise(shapes).name == CASES[case][0]
    assert [layout.name for layout in layouts() if layout.recognises(shapes)] == [CASES[case][0]]


def test_names_of_layouts_agree():
    assert tuple(layout.name for layout in layouts()) == tuple(sorted(NAMES, key=[la.name for la in layouts()].index))
    assert {layout.name for layout in layouts()} == set(NAMES)
    with pytest.raises(ModelError, match=r"no published layout is called 'rar'; there are titok, titok-legacy"):
        layout_named("rar")
    with pytest.raises(ModelError, match=r"these 2 tensors \(a\.weight, b\) are not those of a published family we know: titok,"):
        recognise({"b": (2, 3), "a.weight": (4,)})


@pytest.mark.parametrize("wrapped", [
    STATE,
    collections.OrderedDict(STATE),
    {"state_dict": STATE, "epoch": 3, "hparams": {"lr": 1e-4}},
    {"module": STATE, "optimizer": None},
    {"model": {"state_dict": STATE}},
    {"ema": STATE, "model": {k: v + 1 for k, v in STATE.items()}, "opt": {"step": 3}},
    {f"module.{k}": v for k, v in STATE.items()},
    {"state_dict": {f"module._orig_mod.model.{k}": v for k, v in STATE.items()}},
])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_and_prefixes_come_off(wrapped, zipped, tmp_path):
    torch.save(wrapped, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert same(read(tmp_path / "x.pth").state)


def test_a_prefix_of_some_names_is_part_of_them(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "x.bin")
    assert same(read(tmp_path / "x.bin").state, state)


def test_folders(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"vae": "{'a': 1}"})
    torch.save({"wrong": torch.ones(1)}, tmp_path / "pytorch_model.bin")  # safetensors come first
    found = read(tmp_path)
    assert same(found.state) and found.config == {"__metadata__": {"vae": "{'a': 1}"}}
    (tmp_path / "config.json").write_text('{"n": 3, "m": "${n}"}')
    assert read(tmp_path).config == {"n": 3, "m": 3, "__metadata__": {"vae": "{'a': 1}"}}
    assert read(tmp_path / "model.safetensors").config["m"] == 3  # a standard name belongs to the config.json beside it
    (tmp_path / "model.safetensors").rename(tmp_path / "else.safetensors")
    assert read(tmp_path / "else.safetensors").config.keys() == {"__metadata__"}


def test_shards(tmp_path):
    save_file({"a.weight": STATE["a.weight"]}, tmp_path / "model-1.safetensors")
    save_file({"b": STATE["b"]}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert same(read(tmp_path).state)
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "c": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"b is in the index or in the shards, not in both"):
        read(tmp_path)
    for bad in ('{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}', "[]", '{"weight_map": {}}'):
        index.write_text(bad)
        with pytest.raises(ModelError, match="index"):
            read(tmp_path)


def test_several_or_no_weights(tmp_path):
    with pytest.raises(ModelError, match="no weights there"):
        read(tmp_path)
    (tmp_path / "bae").mkdir()
    save_file(STATE, tmp_path / "bae" / "model.safetensors")
    assert same(read(tmp_path).state)
    torch.save(STATE, tmp_path / "a.bin")
    assert same(read(tmp_path).state)
    torch.save(STATE, tmp_path / "b.bin")
    with pytest.raises(ModelError, match=r"holds several models: give one file, of .*a\.bin.*b\.bin"):
        read(tmp_path)


# what is refused -------------------------------------------------------------------------------------------------


class Hostile:
    """Runs a command when unpickled by a trusting reader."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("suffix", ["bin", "pth", "pt", "ckpt"])
@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_hostile_pickles_run_nothing(tmp_path, suffix, kind):
    mark, path = tmp_path / "mark", tmp_path / f"model.{suffix}"
    content = {"latent_tokens": torch.ones(2), "x": Hostile(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ModelError) as caught:
        tok1d.load(path)
    assert not mark.exists()
    said = str(caught.value)
    assert "\n" not in said and "safetensors" in said and "weights_only" not in said
    if kind != "pickle":
        assert "system, not only tensors and plain data; it was not run" in said
    pickle.loads(pickle.dumps(Hostile(mark)))  # the mark is made by a trusting reader: the test can fail
    assert mark.exists()


def test_other_objects_are_named(tmp_path):
    torch.save({"a": torch.ones(1), "args": argparse.Namespace(lr=1)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"holds argparse\.Namespace, not only tensors"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize(("content", "said"), [
    ([1, 2], "holds no state dict, neither bare nor under ema, state_dict, model, module"),
    ({"lr": 3}, "holds no state dict"),
    ({"a": torch.ones(1), "epoch": 3}, "entry 'epoch' of the state dict is a int, not a tensor"),
    ({1: torch.ones(1)}, "entry 1 of the state dict"),
    ({"a": torch.ones(3).to_sparse()}, "a is a sparse or quantized tensor"),
    ({"a": torch.ones(1).expand(10**6)}, r"a of shape \(1000000,\) stands for more numbers than the file holds"),
    ({"tokenizer_config": {}, "state_dict": {}}, "training checkpoint of 'tok fit': tok export"),
])  # fmt: skip
def test_pickles_that_are_no_state_dict(tmp_path, content, said):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ModelError, match=said):
        read(tmp_path / "x.bin")


def test_damaged_files(tmp_path):
    torch.save(STATE, tmp_path / "whole.bin")
    save_file(STATE, tmp_path / "whole.safetensors")
    for name in ("whole.bin", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        for cut in (0, 7, len(data) // 2, len(data) - 1):
            path = tmp_path / f"x.{name.rpartition('.')[2]}"
            path.write_bytes(data[:cut])
            with pytest.raises(ModelError, match=r"x\.(bin|safetensors)"):
                read(path)
    with pytest.raises(ModelError, match="no such file"):
        read_pickle(tmp_path / "none.bin")


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"a": "${b}"}', '{"a": "${oc.env:HOME}"}', "\xff"])
def test_configurations_that_are_none(tmp_path, text):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read(tmp_path)


# references ------------------------------------------------------------------------------------------------------


def test_references():
    given = {
        "model": {"vq": {"tokens": 32, "sizes": [1, {"n": 7}]}, "length": "${model.vq.tokens}", "same": "${.length}"},
        "tree": "${model.vq}",
        "item": "${model.vq.sizes[1].n}",
        "also": "${model.vq.sizes.1.n}",
        "text": "a-${item}-${also}!",
        "which": "vq",
        "nested": "${model.${which}.tokens}",
        "chain": {"a": "${..item}"},
        "plain": [None, True, 1.5, "$5"],
    }
    found = interpolate(given)
    assert found["model"]["length"] == 32 == found["model"]["same"] and found["tree"] == found["model"]["vq"]
    assert (found["item"], found["also"], found["text"], found["nested"], found["chain"]) == (7, 7, "a-7-7!", 32, {"a": 7})
    assert found["plain"] == given["plain"] and given["tree"] == "${model.vq}"


@pytest.mark.parametrize(("tree", "said"), [
    ({"a": "${b}", "b": "${a}"}, "refers to itself"),
    ({"a": "${a}"}, "refers to itself"),
    ({"a": {"b": "${a}"}}, "refers to itself"),
    ({"a": "x${b}", "b": ["${a}"]}, "refers to itself"),
    ({"a": "${b.c}", "b": {}}, r"a refers to \$\{b\.c\}, and nothing is there"),
    ({"a": "${b.7}", "b": [1]}, "nothing is there"),
    ({"a": "${oc.env:HOME}"}, r"asks for the resolver \$\{oc\.env:HOME\}, which is never run"),
    ({"a": "${eval:'__import__(\"os\")'}"}, "which is never run"),
    ({"a": "n-${b}", "b": {"c": 1}}, "puts a whole tree"),
    ({f"k{i}": f"${{k{i + 1}}}${{k{i + 1}}}" for i in range(40)} | {"k40": "ab"}, "grows beyond 10,000 characters"),
    ({f"k{i}": [f"${{k{i + 1}}}"] * 2 for i in range(40)} | {"k40": 1}, "more than 100,000 entries"),
])  # fmt: skip
def test_references_that_are_refused(tree, said):
    with pytest.raises(ModelError, match=said):
        interpolate(tree)


def test_deep_trees():
    deep: dict = {}
    for _ in range(sys.getrecursionlimit()):
        deep = {"a": deep}
    with pytest.raises(ModelError, match="nested too deeply"):
        interpolate(deep)


# options ---------------------------------------------------------------------------------------------------------


def test_options_replace_published_values(tmp_path):
    golden = publish("titok_legacy_vq", tmp_path)
    assert tok1d.load(tmp_path).quantizer.l2  # the default of two-stage models
    assert not tok1d.load(tmp_path, options={"model.vq_model.use_l2_norm": False}).quantizer.l2
    (tmp_path / "config.json").write_text(json.dumps(tree(golden)))
    assert not tok1d.load(tmp_path, options={"use_l2_norm": False}).quantizer.l2  # wherever it stands
    assert tok1d.load(tmp_path, options={"model.vq_model.strict_length_assertion": False}).is_nested
    assert tok1d.load(tmp_path, options={"use_l2_norm": True}).quantizer.l2  # so already
    for wrong in ("use_l2_nrom", "model.vq_model.use_l2_nrom", "vq_model.use_l2_norm.x"):
        with pytest.raises(ModelError, match=rf"titok-legacy has no option '{wrong}'.*model\.vq_model\.use_l2_norm"):
            tok1d.load(tmp_path, options={wrong: False})


def test_overridden_leaves_the_original():
    given = {"a": [{"x": 1}], "x": 2}
    assert overridden(given, "x", 5) == {"a": [{"x": 5}], "x": 5} and given == {"a": [{"x": 1}], "x": 2}
    assert overridden(given, "x.y", 5)["x"] == {"y": 5}


def test_a_family_can_be_forced(tmp_path):
    publish("titok_vq", tmp_path)
    assert tok1d.load(tmp_path, layout="titok").max_tokens == 8
    with pytest.raises(ModelError, match=r"model\.safetensors: .*tatitok|text_guidance"):
        tok1d.load(tmp_path, layout="tatitok")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_loading_is_strict(tmp_path, change):
    golden = publish("titok_vq", tmp_path)
    state = dict(golden.state)
    if change == "missing":
        del state["decoder.ln_pre.bias"]
    elif change == "unexpected":
        state["decoder.extra"] = torch.ones(1)
    else:
        state["decoder.ln_pre.bias"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="decoder.extra" if change == "unexpected" else "decoder.ln_pre.bias"):
        tok1d.load(tmp_path)
    save_file({**golden.state, "quantize.embed_prob": torch.ones(64)}, tmp_path / "model.safetensors")
    assert tok1d.load(tmp_path).max_tokens == 8  # statistics of training, by name
