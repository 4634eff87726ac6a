"""Published layouts of generators: parity with recorded runs, strict loading, export bit for bit, and exact sizes."""

import pytest
import torch

from tests.golden.read import Golden, read
from tok1d import presets as tokenizers
from tok1d.errors import ModelError
from tok1d.generators import official
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.guidance import guided, strengths
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.masked_body import TrunkBody
from tok1d.generators.masked_steps import unmask
from tok1d.generators.official.maskgit import bert_config
from tok1d.generators.presets import GENERATORS, config_of, generator_named
from tok1d.generators.rar import RARGenerator
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.official.layout import export_state

MASKED = {"maskgit_imagebert": "maskgit-bert", "maskgit_uvit": "maskgit-uvit"}
CASES = {**MASKED, "rar": "rar"}


def load(golden: Golden) -> Generator:
    tree = {"model": {"generator": golden.meta["config"]["generator"]}}
    return official.load_state(golden.state, tree, tokenizer="toy")[1]


@pytest.mark.parametrize("case", CASES)
def test_published_weights_load_strictly_and_export_bit_for_bit(case, tmp_path):
    golden = read(case)
    name, model = official.load_state(golden.state, {"model": {"generator": golden.meta["config"]["generator"]}})
    assert name == CASES[case] and not model.training and model.space.vocab_size == 64 and model.space.tokens == 16
    exported = export_state(official.layout_named(name), model)
    assert exported.keys() == golden.state.keys()
    assert all(exported[k].shape == v.shape and torch.equal(exported[k], v.float()) for k, v in golden.state.items())
    official.write_published(model, name, tmp_path)
    again = official.load_published(tmp_path, tokenizer="toy")[1]  # the BERT's common prefix is taken off by the reader
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.to_config() == {**model.to_config(), "space": again.space.to_config()} and again.space.tokenizer == "toy"

    key = next(k for k in golden.state if "mlp.fc1" in k or "intermediate" in k)
    with pytest.raises(ModelError, match=r"missing .*, unexpected nothing"):
        official.load_state({k: v for k, v in golden.state.items() if k != key}, {}, layout=name)
    with pytest.raises(ModelError, match="unexpected .'extra'"):
        official.load_state({**golden.state, "extra": torch.zeros(1)}, {})
    embeddings = next(k for k, v in golden.state.items() if len(v) == 76)
    with pytest.raises(ModelError, match="too few for 64 codes, a mask, a class and none"):
        official.load_state({**golden.state, embeddings: golden.state[embeddings][:66]}, {})
    with pytest.raises(ModelError, match="not those of a published generator"):
        official.load_state({"a": torch.zeros(1)})


@pytest.mark.parametrize("case", MASKED)
@torch.inference_mode()
def test_masked_logits_and_traces_equal_the_recorded_ones(case):
    golden = read(case)
    model, ids, classes = load(golden), golden.inputs["ids"].long(), golden.inputs["classes"].long()
    given, null = model.condition({"label": classes}, 2), model.condition.null(2)
    golden.check("logits_cond", model.logits(ids, ids == 64, given))
    golden.check("logits_uncond", model.logits(ids, ids == 64, null))

    for trace in golden.meta["config"]["traces"]:
        scale, decay = trace["guidance_scale"], trace["guidance_decay"]
        schedule = {"power-cosine": f"power_cosine({trace.get('guidance_scale_pow', 3.0)})"}.get(decay, decay)
        seen = []
        made = model.generate(
            2, label=classes, steps=trace["steps"], temperature=0.0, annealing=trace["annealing"], schedule=schedule,
            guidance=scale if decay == "power-cosine" else scale + 1, on_step=lambda step, steps, x, seen=seen: seen.append(x.clone()),
        )  # fmt: skip
        wanted = golden.outputs[f"trace_{trace['name']}"].long()
        assert torch.equal(made.ids, wanted[-1]) and len(seen) == trace["steps"], trace["name"]
        for guesses, after in zip(seen, wanted[1:], strict=True):  # guesses fill what the record shows as masked
            assert torch.equal(torch.where(after == 64, 64, guesses), after), trace["name"]


@pytest.mark.parametrize("case", MASKED)
@torch.inference_mode()
def test_masked_traces_equal_the_recorded_ones_under_recorded_noise(case):
    golden = read(case)
    model, noisy, classes = load(golden), golden.meta["config"]["noisy"], golden.inputs["classes"].long()
    given = model.condition({"label": classes}, 2)
    steps, power = noisy["steps"], noisy["guidance_decay"] == "power-cosine"
    g = strengths(noisy["guidance_scale"] + (not power), "power_cosine(3)" if power else noisy["guidance_decay"], steps)

    def predict(step, ids, masked, places):
        both = model.logits(ids.repeat(2, 1), masked.repeat(2, 1), given.join(model.condition.null(2)))
        return torch.take_along_dim(guided(both, 2, g[step]), places[..., None], 1)

    noise = (golden.inputs["uniform_ids"].transpose(0, 1), golden.inputs["uniform_conf"].transpose(0, 1))
    ids, masked = torch.zeros(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.bool)
    options = {"steps": steps, "temperature": noisy["temperature"], "annealing": noisy["annealing"]}
    trace = [torch.full((2, 16), 64)]
    trace += [ids.masked_fill(masked, 64) for ids, masked in unmask(predict, ids, masked, noise, **options)]
    golden.check("trace_noisy", torch.stack(trace))


@torch.inference_mode()
def test_rar_equals_the_recorded_runs():
    golden = read("rar")
    model = load(golden)
    ids, classes, orders = (golden.inputs[name].long() for name in ("ids", "classes", "orders"))
    given = model.condition({"label": classes}, 2)
    golden.check("logits_raster", model.head.logits(model.states(given, ids)))
    golden.check("logits_raster_uncond", model.head.logits(model.states(model.condition.null(2), ids)))
    shuffled = ids.gather(1, orders)
    golden.check("labels_permuted", shuffled)
    golden.check("logits_permuted", model.head.logits(model.states(given, shuffled, orders)))
    for trace in golden.meta["config"]["traces"]:
        guidance = trace["guidance_scale"] or 1.0  # they switch guidance off by 0
        schedule = f"power_cosine({trace['guidance_scale_pow']})"
        made = model.generate(2, label=classes, guidance=guidance, schedule=schedule, temperature=0.0)
        golden.check(f"greedy_{trace['name']}", made.ids)


@torch.inference_mode()
def test_rar_cached_logits_equal_the_recorded_ones(monkeypatch):
    golden = read("rar")
    model, seen = load(golden), []
    ids = golden.inputs["ids"].long()
    whole = model.head.sample

    def sample(states, uniform, *rest):  # the recorded tokens go on, whatever would be drawn
        seen.append(model.head.logits(states))
        whole(states, uniform, *rest)
        return ids[:, len(seen) - 1]

    monkeypatch.setattr(model.head, "sample", sample)
    monkeypatch.setattr(model.trunk, "chunk", lambda rows: 5)
    model.generate(2, label=golden.inputs["classes"].long())
    golden.check("logits_raster_cached", torch.stack(seen, 1))


@pytest.mark.parametrize("preset", [p for p in GENERATORS if p.layout != "tok1d"], ids=lambda preset: preset.name)
def test_table_of_published_generators(preset):
    with torch.device("meta"):
        model = Generator.from_config(config_of(preset))
    assert sum(p.numel() for p in model.parameters()) == preset.parameters
    exported = export_state(official.layout_named(preset.layout), model)
    assert sum(v.numel() for v in exported.values()) == preset.parameters
    back = official.layout_named(preset.layout).config({k: tuple(v.shape) for k, v in exported.items()}, {}, preset.tokenizer)
    assert back == config_of(preset)
    tokenizer = next(row for row in tokenizers.PRESETS if row.name == preset.tokenizer)
    assert tokenizer.tokens == preset.tokens and 2**tokenizer.bits_per_token == preset.vocab_size
    assert set(preset.sampling) <= set(model.options)
    assert generator_named(preset.name) is preset


def test_what_has_no_published_layout_is_refused(tmp_path):
    space = TokenSpace(tokens=4, vocab_size=8)
    masked = MaskedGenerator(space, ClassCondition(2), TrunkBody(16, 1, 1))
    with pytest.raises(ModelError, match="of a MaskedGenerator with a BertBody, got TrunkBody"):
        official.write_published(masked, "maskgit-bert", tmp_path)
    with pytest.raises(ModelError, match="rows than tokens use"):
        official.write_published(RARGenerator(space, ClassCondition(2), 16, 1, 1), "rar", tmp_path)
    with pytest.raises(ModelError, match="of generators of classes, this one has Unconditional"):
        official.write_published(RARGenerator(space, Unconditional(), 16, 1, 1), "rar", tmp_path)
    with pytest.raises(ModelError, match="no published generator has a layout called 'x'"):
        official.write_published(masked, "x", tmp_path)
    with pytest.raises(ModelError, match="no generator is called"):
        generator_named("x")
    config = bert_config("t", 4, 8, 2, 30, 1, 16)
    with pytest.raises(ModelError, match="width 30 cannot be split into 16 heads"):
        Generator.from_config(config)
