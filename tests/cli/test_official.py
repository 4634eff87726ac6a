"""Published weights end to end: loaded by file as the real ones are, their recorded ids, the command line, and back."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import tok1d
from tests.dct_model import picture
from tests.published import CASES, publish, tree
from tok1d import licences
from tok1d.errors import ModelError, TokenError
from tok1d.image_io import read, write
from tok1d.licences import LicenceNotice
from tok1d.presets import PRESETS

TITOK = ("titok_vq", "titok_vae", "titok_legacy_vq", "titok_legacy_stage1", "one_d_piece", "tatitok_vq")
SAID = {"scaling_factor": 0.6, "max_timestep": 1.0}  # what FlexTok's own config.json says


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(licences, "_announced", set())
    monkeypatch.delenv(licences.VARIABLE, raising=False)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


def told(case):
    return SAID if case == "flextok" else {"dataset": {"preprocessing": {"crop_size": 64}}} if case == "maskgit_vqgan" else None


# loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::tok1d.licences.LicenceNotice")
@pytest.mark.parametrize("case", CASES)
def test_golden_weights_load_as_files_and_our_folder_is_the_same(case, tmp_path):
    """Folder with config.json, bare file, our folder: the same model, which makes the recorded ids."""
    folder = tmp_path / case.replace("_", "-")
    golden = publish(case, folder, config=told(case))
    model = tok1d.load(folder)
    bare = tok1d.load(publish_bare(case, tmp_path), options=CASES[case][1])
    images = golden.inputs["images"]
    images = images / 2 + 0.5 if case == "flextok" else images
    if "indices" in golden.outputs or "ids" in golden.outputs:
        wanted = golden.outputs.get("indices", golden.outputs.get("ids")).flatten(1).long()
        for made in (model, bare):
            assert torch.equal(made.encode(images.clamp(0, 1)).ids, wanted)
    else:
        z = model.encode_latents(images)[..., : model.quantizer.code_dim]
        golden.check("mean", z.transpose(1, 2)[:, :, None])
    model.save_pretrained(tmp_path / "ours")
    again = tok1d.load(tmp_path / "ours")
    assert again.model_id == model.model_id == bare.model_id and again.to_config() == model.to_config()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def publish_bare(case, tmp_path):
    file = f"some-{case}.bin"
    publish(case, tmp_path, file)
    return tmp_path / file


@pytest.mark.parametrize("case", TITOK)
def test_configuration_trees_with_references(case, tmp_path):
    golden = publish(case, tmp_path)
    config = tree(golden)
    for missing in ("is_legacy", "finetune_decoder", "quantize_mode"):
        config["model"]["vq_model"].pop(missing, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tok1d.load(tmp_path)
    assert model.max_tokens == golden.meta["config"]["vq_model"]["num_latent_tokens"] and model.image_size == (64, 64)
    assert not model.is_discrete or model.quantizer.l2 == golden.meta["config"]["vq_model"]["use_l2_norm"]
    assert model.is_nested == (case == "one_d_piece")


def test_a_hostile_configuration_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    golden = publish("titok_vq", tmp_path)
    for hostile in (f"${{oc.env:HOME}}${{touch:{mark}}}", f"${{eval:__import__('os').system('touch {mark}')}}"):
        (tmp_path / "config.json").write_text(json.dumps({**tree(golden), "x": hostile}))
        with pytest.raises(ModelError, match="which is never run"):
            tok1d.load(tmp_path)
    config = {"vae": {"_target_": "os.system", "command": f"touch {mark}"}}
    publish("flextok", tmp_path / "f", config=config)
    with pytest.raises(ModelError, match="os.system"):
        tok1d.load(tmp_path / "f")
    assert not mark.exists()
    os.system(f"touch {mark}")
    assert mark.exists()


# command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photo64(tmp_path):
    write(tmp_path / "photo.png", picture(1, 70, 90))
    return tmp_path / "photo.png"


def test_encode_and_decode(tok, tmp_path, photo64):
    publish("one_d_piece", tmp_path / "one-d-piece")
    folder = tmp_path / "one-d-piece"
    done = tok("encode", photo64, "--model", folder / "model.safetensors", "--tokens", 5, "-o", tmp_path / "a.tok")
    assert done.code == 0, done.err
    done = tok("decode", tmp_path / "a.tok", "--model", folder, "-o", tmp_path / "b.png", "--tokens", 3)
    assert done.code == 0, done.err
    assert read(tmp_path / "b.png").shape == (1, 3, 70, 90)


def test_sampling_options(tok, tmp_path, photo64):
    publish("flextok", tmp_path / "f", config=SAID)
    model = ("--model", tmp_path / "f")
    done = tok("encode", photo64, *model, "-o", tmp_path / "a.tok", "--tokens", 4)
    assert done.code == 0 and done.err.count("research only") == 1, done.err
    assert all(line.startswith("tok: ") for line in done.err.splitlines())
    pictures = {}
    sampled = ("--steps", 1, "--guidance", 1)
    for name, flags in {"a": sampled, "same": sampled, "seed": (*sampled, "--seed", 5), "steps": ("--steps", 2, "--guidance", 1, "--solver", "heun")}.items():
        done = tok("decode", tmp_path / "a.tok", *model, "-o", tmp_path / f"{name}.png", *flags)
        assert done.code == 0, done.err
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert pictures["a"] == pictures["same"] and len(set(pictures.values())) == 3
    done = tok("decode", tmp_path / "a.tok", *model, "-o", tmp_path / "x.png", "--text", "a cat")
    assert done.code == 1 and "has no option 'text'; its options: steps, guidance" in done.err
    assert tok("decode", tmp_path / "a.tok", *model, "--steps", 0, "-o", tmp_path / "x.png").code == 2
    done = tok("decode", tmp_path / "a.tok", *model, "--solver", "magic", "-o", tmp_path / "x.png")
    assert done.code == 1 and "magic" in done.err and not (tmp_path / "x.png").exists()


def test_text_is_encoded_once_for_all_images(tok, tmp_path, photo64, monkeypatch):
    from tok1d.tokenizers import budget
    from tok1d.tokenizers.official import clip_text

    asked = []

    def text_features(prompts):
        asked.append(prompts)
        return torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(len(prompts[0])))

    monkeypatch.setattr(clip_text, "text_features", text_features)
    publish("tatitok_vq", tmp_path / "t")
    model = ("--model", tmp_path / "t")
    write(tmp_path / "photo2.png", picture(2, 64, 64))
    assert tok("encode", tmp_path / "*.png", *model, "-o", tmp_path / "t.jsonl").code == 0
    for text in ("a cat", "a photo of a dog"):
        done = tok("decode", tmp_path / "t.jsonl", *model, "--text", text, "-o", tmp_path / f"out-{len(text)}/", "--batch-size", 1)
        assert done.code == 0, done.err
    assert asked == [["a cat"], ["a photo of a dog"]]
    made = [sorted(p.read_bytes() for p in (tmp_path / f"out-{n}").rglob("*.png")) for n in (5, 16)]
    assert len(made[0]) == 2 and made[0] != made[1]
    monkeypatch.setattr(budget, "lpips_on", lambda device: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    numbers = [tok("reconstruct", photo64, *model, "--text", text, "-o", tmp_path / "g.png", "-f", "--json").rows[0] for text in ("a cat", "a dog!")]
    assert numbers[0]["psnr"] != numbers[1]["psnr"] and numbers[0]["tokens"] == 8


def test_options_a_decoder_does_not_have(tok, tmp_path, photo64):
    tok("encode", photo64, "-o", tmp_path / "a.tok")
    for verb in (("decode", tmp_path / "a.tok", "-o", tmp_path / "x.png"), ("reconstruct", photo64, "-o", tmp_path / "x.png")):
        done = tok(*verb, "--steps", 3)
        assert done.code == 1 and "has no option 'steps'; its options: none" in done.err and not (tmp_path / "x.png").exists()
    with pytest.raises(TokenError, match="has no option 'guidance'"):
        tok1d.load("default").decode(torch.zeros(1, 4, dtype=torch.int64), guidance=2.0)


def test_show_and_info(tok, tmp_path):
    publish("titok_legacy_vq", tmp_path / "t")
    for verb in ("show", "info"):
        done = tok(verb, tmp_path / "t")
        assert done.code == 0 and "family      titok-legacy\n" in done.out and "LegacyTiTokEncoder" in done.out
        assert "pixel_decoder" in done.out and "float16" in done.out
        row = tok(verb, tmp_path / "t", "--json").rows[0]
        assert row["family"] == "titok-legacy" and row["config"]["encoder"]["tokens"] == 8 and row["card"] is None
        assert row["parameters"] == sum(v.numel() for v in load_file(tmp_path / "t/model.safetensors").values())
    assert tok("info", tmp_path / "t", "default").code == 1  # the second is no file: the first is shown all the same
    (tmp_path / "x.bin").write_bytes(b"no")
    assert "tensors that can be read safely" in tok("info", tmp_path / "x.bin").err


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.layout != "tok1d"][::5], ids=lambda p: p.name)
def test_rows_of_the_table_are_shown_without_a_download(tok, offline, preset):
    for name in (preset.name, preset.hub_id):
        done = tok("show", name)
        assert done.code == 0 and not done.err and preset.hub_id in done.out and f"{preset.parameters:,}" in done.out
        assert f"not on this machine; any use fetches it: tok reconstruct photo.jpg --model {preset.name}" in done.out
        assert ("--accept-license" in done.out) == preset.research_only
    row = tok("show", preset.name, "--json").rows[0]
    assert row["fetched"] is False and row["name"] == preset.name and row["licence"] == preset.licence


def test_licences_at_the_command_line(tok, offline, tmp_path, photo64):
    done = tok("encode", photo64, "--model", "flextok-d18-d28", "-o", tmp_path / "a.tok")
    assert done.code == 1 and "research only (apple-amlr" in done.err and "--accept-license" in done.err and done.err.count("\n") == 1
    done = tok("encode", photo64, "--model", "flextok-d18-d28", "-o", tmp_path / "a.tok", "--accept-license")
    assert done.code == 1 and "hub cannot be reached" in done.err and done.err.count("research only (apple-amlr") == 1


# export ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::tok1d.licences.LicenceNotice")
@pytest.mark.parametrize("case", CASES)
def test_export_to_ours_and_back_to_the_published_layout(tok, case, tmp_path):
    golden = publish(case, tmp_path / "p", config=told(case))
    layout = CASES[case][0]
    done = tok("export", tmp_path / "p", tmp_path / "ours")
    assert done.code == 0, done.err
    done = tok("export", tmp_path / "ours", tmp_path / "back", "--layout", layout)
    assert done.code == 0, done.err
    state = load_file(tmp_path / "back/model.safetensors")
    assert state.keys() == golden.state.keys() - {"quantize.embed_prob"}
    assert all(torch.equal(value, golden.state[key].float()) for key, value in state.items())
    a, b = tok1d.load(tmp_path / "p"), tok1d.load(tmp_path / "back")
    assert a.to_config() == {**b.to_config(), "name": a.name} and a.model_id == b.model_id == tok1d.load(tmp_path / "ours").model_id


@pytest.mark.parametrize("case", TITOK)
def test_exported_trees_are_those_the_published_code_reads(tok, case, tmp_path):
    golden = publish(case, tmp_path / "p", config={})
    (tmp_path / "p/config.json").write_text(json.dumps(tree(golden)))
    assert tok("export", tmp_path / "p", tmp_path / "back", "--layout", CASES[case][0]).code == 0
    written = json.loads((tmp_path / "back/config.json").read_text())
    wanted = golden.meta["config"]["vq_model"]
    found = written["model"]["vq_model"]
    assert written["dataset"]["preprocessing"]["crop_size"] == 64 and written.keys() == {"experiment", "model", "dataset"}
    defaults = {"finetune_decoder": True, "is_legacy": True, "quantize_mode": "vq"}
    discrete = wanted.get("quantize_mode", "vq") == "vq"
    skipped = {"clustering_vq"} if discrete else {"codebook_size", "use_l2_norm", "commitment_cost"}
    for key in (wanted.keys() | defaults) - skipped:
        assert found[key] == wanted.get(key, defaults.get(key)), key


def test_instella_there_and_back(tok, tmp_path):
    """No recorded case holds these weights: random ones in the published layout."""
    from tok1d.tokenizers.official.instella import instella_config
    from tok1d.tokenizers.tokenizer import Tokenizer1D

    torch.manual_seed(0)
    sizes = {"tokens": 4, "bits": 64, "dim": 64, "code_dim": 64, "encoder_width": 64, "decoder_width": 64}
    model = Tokenizer1D.from_config(instella_config("tiny", **sizes, encoder_depth=3, decoder_depth=2, image_size=64))
    model.eval().save_pretrained(tmp_path / "ours")
    done = tok("export", tmp_path / "ours", tmp_path / "bae", "--layout", "instella")
    assert done.code == 0 and [p.name for p in (tmp_path / "bae").iterdir()] == ["model.safetensors"], done.err
    with pytest.warns(LicenceNotice, match="if these weights come from the published ones: instella-bae") as said:
        again = tok1d.load(tmp_path / "bae/model.safetensors")  # files at hand: the notice only
    assert [w.filename for w in said] == [__file__] and again.name == "bae" and again.any_size
    image = torch.rand(1, 3, 96, 64)
    seq = again.encode(image)
    assert torch.equal(seq.ids if seq.bits is None else seq.bits, model.encode(image).data) and seq.data.shape[1] == 4
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_card_of_converted_weights_keeps_their_licence(tok, tmp_path, monkeypatch):
    from tok1d import hub

    publish("titok_legacy_vq", tmp_path / "p")
    preset = next(p for p in PRESETS if p.name == "titok-l-32")
    monkeypatch.setattr(hub, "find", lambda source, **_: hub.Found(tmp_path / "p", source, False, preset))
    assert tok("export", "titok-l-32", tmp_path / "ours").code == 0
    card = (tmp_path / "ours/README.md").read_text()
    assert card.startswith("# titok-l-32\n") and "## Origin" in card and preset.url in card
    assert "licence of the weights: Apache-2.0. Paper: https://arxiv.org/abs/2406.07550" in card


def test_export_refuses(tok, tmp_path, model):
    done = tok("export", model, tmp_path / "x", "--layout", "titok")
    assert done.code == 1 and "layout" in done.err and "DctEncoder" in done.err and not (tmp_path / "x").exists()
    done = tok("export", model, tmp_path / "x", "--layout", "titokk")
    assert done.code == 2 and "did you mean titok" in done.err
    done = tok("export", "defualt", tmp_path / "x")
    assert done.code == 1 and "did you mean 'default'" in done.err
    publish("titok_vq", tmp_path / "p")
    assert tok("export", tmp_path / "p", tmp_path / "y", "--layout", "titok").code == 0
    done = tok("export", tmp_path / "p", tmp_path / "y", "--layout", "titok")
    assert done.code == 2 and "holds config.json already" in done.err
    assert tok("export", tmp_path / "p", tmp_path / "y", "--layout", "titok", "-f", "--dtype", "float16").code == 0
    assert {v.dtype for v in load_file(tmp_path / "y/model.safetensors").values()} == {torch.float16}


def test_a_foreign_checkpoint_of_a_known_family(tok, tmp_path):
    golden = publish("titok_vq", tmp_path / "unused")
    torch.save({"state_dict": {f"model.{k}": v for k, v in golden.state.items()}, "epoch": 1}, tmp_path / "last.ckpt")
    assert tok("export", tmp_path / "last.ckpt", tmp_path / "ours", "--name", "mine").code == 0
    model = tok1d.load(tmp_path / "ours")
    assert model.name == "mine" and torch.equal(model.encode(golden.inputs["images"]).ids, golden.outputs["indices"].flatten(1))
