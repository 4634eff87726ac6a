"""Faces scored per second: the face measure beside the one-by-one path of TokBench's script.

One by one: for each rate and each face, both the original and the reconstruction are aligned (insightface's norm_crop) and embedded alone
(insightface's ArcFaceONNX.get_feat in onnxruntime). The measure embeds originals once for all rates and faces in batches. Same network, same
threads, in turns, so that a busy machine slows both; images are decoded and reconstructed before the clock starts. The parts of the gain are
timed as well: one by one with originals kept, and the measure's network alone, face by face and in batches.

    python -m benchmarks.face_speed --faces faces-00000.tar      # a tar or folder of photos, faces found by YuNet
    python -m benchmarks.face_speed --images 16                  # noise with landmarks, the same work

Results: benchmarks/results/face_speed.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, save, say


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, help="tar or folder of photos; without it landmarks on noise")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 24, 32, 48, 64, 96, 128, 192], help="rates: pictures shrunk to these sides and enlarged")
    parser.add_argument("--rounds", type=int, default=5, help="turns over all faces")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    import cv2
    import onnxruntime
    import torch
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.utils import face_align

    from tok1d.eval.binned import Bins
    from tok1d.eval.face_nets import SFace, _zoo_file
    from tok1d.eval.faces import Faces, align
    from tok1d.eval.manifest import landmarks
    from tok1d.eval.onnx_net import fold, read_onnx
    from tok1d.eval.systems import ResizeSystem

    warnings.simplefilter("ignore", FutureWarning)  # of scikit-image, at every face that insightface aligns
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    sface = SFace()
    batch = photos(args.faces, args.images) if args.faces else noise(args.images)
    rates = list(ResizeSystem(args.sides).reconstruct(batch.views, [s.id for s in batch.samples]))
    points = [landmarks(s.faces)[0].numpy() for s in batch.samples]
    originals, pictures = bgr(batch.views), {r.rate.name: bgr(r.images) for r in rates}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sface.onnx"
        path.write_bytes(fold(read_onnx(_zoo_file(None, "face_recognition_sface_2021dec_int8bq.onnx"))).SerializeToString())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = args.threads
        single = ArcFaceONNX(str(path), onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"]))

    def vector(image: np.ndarray, kps: np.ndarray) -> np.ndarray:
        return single.get_feat(face_align.norm_crop(image, kps))[0]

    def one_by_one() -> list[float]:
        return [single.compute_sim(vector(a, k), vector(b, k)) for reconstructed in pictures.values() for a, b, k in zip(originals, reconstructed, points)]

    def originals_kept() -> list[float]:
        kept = [vector(a, k) for a, k in zip(originals, points)]
        return [single.compute_sim(v, vector(b, k)) for reconstructed in pictures.values() for v, b, k in zip(kept, reconstructed, points)]

    def measure() -> list[float]:
        faces = Faces(sface, Bins("all", (0.0, 10.0), ("all",)))
        faces.originals(batch)
        for rate in rates:
            faces.pictures(batch, rate)
        rows = {(r["rate"], r["id"]): r["similarity"] for r in faces.flush()}
        return [rows[name, s.id] for name in pictures for s in batch.samples]

    aligned = align(batch.views, torch.from_numpy(np.stack(points)), range(len(points)))

    def embed_singly() -> list[float]:
        return [float(single.get_feat(image)[0, 0]) for image in bgr(aligned)]

    def embed_together() -> list[float]:
        return sface.embed(aligned)[:, 0].tolist()

    paths: dict[str, Callable[[], list[float]]] = {
        "measure": measure, "one_by_one": one_by_one, "originals_kept": originals_kept, "embed_singly": embed_singly, "embed_together": embed_together,
    }  # fmt: skip
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    found: dict[str, list[float]] = {}
    for name in ("embed_singly", "embed_together"):
        paths[name]()
    for turn in range(args.rounds):
        for name, path_of in paths.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = path_of()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        say(f"turn {turn + 1} of {args.rounds}: " + ", ".join(f"{n} {s[-1][0]:.2f} s" for n, s in seconds.items()))
    drift = max(abs(a - b) for a, b in zip(found["measure"], found["one_by_one"]))
    pairs = len(found["measure"])
    rows = {}
    for name, spent in seconds.items():
        count = pairs if len(found[name]) == pairs else len(points)
        wall, cpu = (1e3 * statistics.median(s) / count for s in zip(*spent))
        rows[name] = {"of": "pair" if count == pairs else "face", "wall_ms": round(wall, 2), "cpu_ms": round(cpu, 2)}
        print(f"{name:16s} {wall:8.2f} ms wall, {cpu:8.2f} ms of processor a {rows[name]['of']}")
    ratios = {
        "one_by_one / measure": ratio(seconds["one_by_one"], seconds["measure"]),
        "originals_kept / measure": ratio(seconds["originals_kept"], seconds["measure"]),
        "embed_singly / embed_together": ratio(seconds["embed_singly"], seconds["embed_together"]),
    }
    for name, value in ratios.items():
        print(f"{name}: {value}")
    print(f"similarities differ by at most {drift:.2g}")
    body: dict[str, Any] = {
        "protocol": f"{len(points)} faces at {len(rates)} rates, {args.rounds} turns of each path; median of turns; views of 256 px in memory",
        "faces": "photos" if args.faces else "noise",
        "embedder": sface.id,
        "onnxruntime": onnxruntime.__version__,
        "paths": rows,
        "ratios": ratios,
        "largest_difference_of_similarities": float(f"{drift:.2g}"),
    }
    print(save("face_speed", body, threads=args.threads, folder=args.results))


def ratio(slow: list[tuple[float, float]], fast: list[tuple[float, float]]) -> dict[str, Any]:
    """Wall and processor time of one path by that of the other, turn by turn."""
    kinds = {}
    for place, kind in enumerate(("wall", "cpu")):
        turns = sorted(a[place] / b[place] for a, b in zip(slow, fast))
        kinds[kind] = {"median": round(statistics.median(turns), 2), "least": round(turns[0], 2), "most": round(turns[-1], 2)}
    return kinds


def bgr(images: Any) -> list[np.ndarray]:
    """uint8 (B, 3, H, W) RGB → arrays as OpenCV reads them."""
    return [np.ascontiguousarray(x) for x in images.flip(1).permute(0, 2, 3, 1).numpy()]


def photos(path: Path, count: int) -> Any:
    """The largest face of each of ``count`` photos of the last 203, in views of 256 px."""
    from tok1d.eval.face_nets import annotate_faces
    from tok1d.eval.manifest import Manifest

    manifest = Manifest.load(path)
    manifest = annotate_faces(replace(manifest, samples=manifest.samples[-203:]).choose(count))
    samples = [replace(s, faces=s.faces[:1]) for s in manifest.samples if s.faces]
    return batch_of(samples, [manifest.read(s) for s in samples])


def noise(count: int) -> Any:
    """Noise with the landmarks of a face, turned a little."""
    import torch

    from tok1d.eval.face_align import TEMPLATE
    from tok1d.eval.manifest import Face, Sample

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 256, 256), generator=generator, dtype=torch.uint8)
    kps = torch.tensor(TEMPLATE) * 1.3 + 50 + torch.randn(count, 5, 2, generator=generator) * 4
    samples = [Sample(f"{i:04d}", "", 256, 256, faces=(Face(tuple(map(tuple, k.tolist())), 0.4),)) for i, k in enumerate(kps)]  # type: ignore[arg-type]
    return batch_of(samples, list(images))


def batch_of(samples: list[Any], images: list[Any]) -> Any:
    """A batch whose originals are their views, so that both paths see the same pixels and landmarks."""
    import torch

    from tok1d.eval.manifest import Face, landmarks
    from tok1d.eval.measures import Batch
    from tok1d.eval.protocol import protocol
    from tok1d.eval.view import make_view

    fit = protocol("fit256-v1")
    views, moved = [], []
    for sample, image in zip(samples, images):
        view, geometry = make_view(image, fit)
        kps = geometry.to_view(landmarks(sample.faces)[0] + 0.5) - 0.5
        face = Face(tuple(map(tuple, kps.tolist())), sample.faces[0].scale)  # type: ignore[arg-type]
        views.append(view)
        moved.append(replace(sample, width=256, height=256, faces=(face,)))
    return Batch(moved, torch.stack(views), [make_view(v, fit)[1] for v in views], views, fit)


if __name__ == "__main__":
    main()
