"""Tokens as jsonl, npz and safetensors: equal to .tok, and as strict."""

import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from tok1d import disk, token_formats
from tok1d.errors import TokenError, TokError, TokFileError, UsageError
from tok1d.token_formats import SUFFIXES, read_tokens, write_tokens
from tok1d.tokens import Geometry, TokenSequence

FOREIGN = (".jsonl", ".npz", ".safetensors")


TWO = (Geometry(300, 200, "crop"), Geometry(5, 6))


def make(vocab: int = 1000, geometry=TWO, lengths=(4, 2), **kwargs) -> TokenSequence:
    ids = torch.tensor([[0, 1, vocab - 1, vocab // 2], [vocab - 1, 0, 0, 0]])
    return TokenSequence(ids, vocab, torch.tensor(lengths), model_id=2**64 - 2, geometry=geometry, **kwargs)


def codes(d: int = 70) -> TokenSequence:
    bits = (torch.arange(2 * 3 * d) % 3 == 0).to(torch.uint8).view(2, 3, d)
    return TokenSequence(None, 2**d, bits=bits, nested=False)


def tiled() -> TokenSequence:
    return TokenSequence(torch.arange(12).view(6, 2), 16, geometry=(Geometry(3, 9, "tile", 2, 2), Geometry(1, 9, "tile", 1, 2)))


def same(a: TokenSequence, b: TokenSequence) -> bool:
    plain = lambda s: (s.vocab_size, s.model_id, s.geometry, s.nested, s.bits is None, s.lengths.tolist())  # noqa: E731
    return plain(a) == plain(b) and torch.equal(a.data, b.data)


ALL = {
    "ids": make(),
    "fixed": make(nested=False),
    "bare": make(geometry=None, vocab=4096),
    "62 bits": make(vocab=2**62),
    "wide": make(vocab=7**20),
    "two": make(vocab=2, lengths=(4, 1)),
    "codes": codes(),
    "255 bits": codes(255),
    "tiled": tiled(),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ALL)
def test_round_trip(tmp_path, kind, suffix):
    path = tmp_path / f"x{suffix.upper()}"
    seq = ALL[kind]
    images = len(seq.geometry) if seq.geometry else len(seq)
    for names in (None, [f"größe {i}.png" for i in range(images)]):
        assert write_tokens(seq, path, names) == path.stat().st_size
        assert same(read_tokens(path), seq)
    assert os.listdir(tmp_path) == [path.name]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_ids_survive_every_format(tmp_path, data):
    vocab = data.draw(st.integers(1, 2**62))
    rows = data.draw(st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9), min_size=1, max_size=4))
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for target, row in zip(ids, rows):
        target[: len(row)] = torch.tensor(row)
    seq = TokenSequence(ids, vocab, torch.tensor([len(r) for r in rows]), model_id=data.draw(st.integers(0, 2**64 - 1)))
    for suffix in SUFFIXES:
        write_tokens(seq, tmp_path / f"x{suffix}")
        assert same(read_tokens(tmp_path / f"x{suffix}"), seq)


def test_tiles_of_different_length_go_everywhere_but_into_tok(tmp_path):
    seq = TokenSequence(torch.tensor([[1, 2], [3, 0]]), 8, torch.tensor([2, 1]), geometry=(Geometry(1, 2, "tile", 1, 2),))
    for suffix in FOREIGN:
        write_tokens(seq, tmp_path / f"x{suffix}")
        assert same(read_tokens(tmp_path / f"x{suffix}"), seq)
    with pytest.raises(TokenError, match="same number of tokens"):
        write_tokens(seq, tmp_path / "x.tok")


def test_what_others_find_in_the_files(tmp_path):
    seq = make()
    for suffix in SUFFIXES:
        write_tokens(seq, tmp_path / f"x{suffix}", ["a.png", "b.png"])
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "ids": [[0, 1, 999, 500]],
        "lengths": [4],
        "vocab_size": 1000,
        "model_id": "fffffffffffffffe",
        "geometry": {"height": 300, "width": 200, "policy": "crop", "rows": 1, "cols": 1},
        "nested": True,
        "meta": {"name": "a.png"},
    }
    assert lines[1]["ids"] == [[999, 0]] and len(lines) == 2
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["ids"].dtype == np.int16 and file["ids"].tolist() == seq.ids.tolist()
        assert file["names"].tolist() == ["a.png", "b.png"] and int(file["model_id"]) == 2**64 - 2
        assert file["geometry"].tolist() == [[300, 200, 2, 1, 1], [5, 6, 0, 1, 1]] and file["lengths"].tolist() == [4, 2]
    tensors = load_safetensors((tmp_path / "x.safetensors").read_bytes())
    assert tensors["ids"].tolist() == seq.ids.tolist() and set(tensors) == {"ids", "lengths", "geometry"}


@pytest.mark.parametrize("name", ["x.txt", "x", "x.tok.gz", ".tok"])
def test_other_suffixes(tmp_path, name):
    for call in (lambda: write_tokens(make(), tmp_path / name), lambda: read_tokens(tmp_path / name)):
        with pytest.raises(UsageError, match=r"\.tok, \.jsonl, \.npz, \.safetensors"):
            call()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_refuses_and_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"x{suffix}"
    bad = [
        (make(), ["one"], "names needs one entry per image"),
        (TokenSequence(torch.zeros(0, 3, dtype=torch.int64), 8), None, "nothing to store"),
        (TokenSequence(torch.tensor([[8]]), 8), None, "[0, 8)"),
        (TokenSequence(torch.tensor([[-1]]), 8), None, "[0, 8)"),
        (TokenSequence(torch.zeros(1, 0, dtype=torch.int64), 8), None, "stored"),
        (make(lengths=(4, 9)), None, "stored"),
        (make(lengths=(4, 0)), None, "stored"),
        (make(geometry=(Geometry(1, 70000), Geometry(1, 1))), None, "65535"),
        (make(geometry=(Geometry(1, 1, "bend"), Geometry(1, 1))), None, "stored"),
        (TokenSequence(None, 9, bits=torch.zeros(1, 1, 3, dtype=torch.uint8)), None, "vocabulary|vocab_size"),
    ]
    for seq, names, message in bad:
        with pytest.raises(TokenError, match=message.replace("[", r"\[").replace(")", r"\)")):
            write_tokens(seq, path, names)
    assert not os.listdir(tmp_path)
    write_tokens(make(), path)
    before = path.read_bytes()
    with pytest.raises(TokError, match="exists already"):
        write_tokens(make(nested=False), path, overwrite=False)
    monkeypatch.setattr(disk.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TokError, match="No space left"):
        write_tokens(make(nested=False), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_padding_beyond_lengths_must_be_zero(tmp_path):
    seq = TokenSequence(torch.tensor([[1, 2]]), 8, torch.tensor([1]))
    with pytest.raises(TokenError, match="beyond lengths must be zero"):
        write_tokens(seq, tmp_path / "x.npz")


# malformed files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_foreign_missing_and_cut_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(TokFileError, match="cannot be read"):
        read_tokens(path)
    write_tokens(make(), path)
    good = path.read_bytes()
    for data in (b"", b"hello", bytes(100), b"\x89PNG\r\n\x1a\n" + bytes(99), b"PK\x03\x04" + bytes(99), b"\xff" * 200, good[:-9], good[:20], good[9:]):
        path.write_bytes(data)
        with pytest.raises(TokFileError, match=path.name):
            read_tokens(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(TokFileError):
        read_tokens(path)


@pytest.mark.parametrize("suffix", FOREIGN)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_valid_tokens_or_an_error(tmp_path, suffix, data):
    """jsonl and safetensors carry no checksum: a flip may make other tokens, never other trouble."""
    path = tmp_path / f"x{suffix}"
    write_tokens(make(), path, ["a", "b"])
    blob = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(blob)
    try:
        seq = read_tokens(path)
    except TokFileError as error:
        assert "\n" not in str(error)
    else:
        assert 0 <= seq.ids.min() <= seq.ids.max() < seq.vocab_size and seq.lengths.max() <= seq.shape[1]


LINE = {
    "ids": [[1, 2, 3]],
    "lengths": [3],
    "vocab_size": 10,
    "model_id": "00000000000000ff",
    "geometry": {"height": 3, "width": 4, "policy": "pad", "rows": 1, "cols": 1},
}
BIT_LINE = {"bits": [["010", "111"]], "lengths": [2], "vocab_size": 8, "model_id": "0" * 16, "geometry": None}


def line(base=LINE, without=None, **changes) -> str:
    return json.dumps({k: v for k, v in (base | changes).items() if k != without})


def test_minimal_lines_are_accepted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{line()}\n\n{line(ids=[[9]], lengths=[1], nested=False)}")
    seq = read_tokens(path)
    assert seq.ids.tolist() == [[1, 2, 3], [9, 0, 0]] and seq.lengths.tolist() == [3, 1] and seq.nested is False
    path.write_text(line(BIT_LINE))
    assert read_tokens(path).bits.tolist() == [[[0, 1, 0], [1, 1, 1]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        (line(ids=[[1, float("nan"), 3]]), "not valid JSON"),
        (line(ids=[[1, 2.0, 3]]), "integers in"),
        (line(ids=[[1, True, 3]]), "integers in"),
        (line(ids=[[1, "2", 3]]), "integers in"),
        (line(ids=[[1, [2], 3]]), "integers in"),
        (line(ids=[[1, None, 3]]), "integers in"),
        (line(ids=[[1, 10, 3]]), "integers in"),
        (line(ids=[[1, -1, 3]]), "integers in"),
        (line(ids=[[1, 2**70, 3]]), "integers in"),
        (line(ids=[1, 2, 3]), "list of rows"),
        (line(ids=[]), "list of rows"),
        (line(ids=[[]], lengths=[0]), "list of rows"),
        (line(ids={"0": 1}), "list of rows"),
        (line(ids=None), "list of rows"),
        (line(lengths=[2]), "lengths must be"),
        (line(lengths=[True], ids=[[1]]), "lengths must be"),
        (line(lengths=3), "lengths must be"),
        *[(line(without=key), f"{key} missing") for key in ("lengths", "vocab_size", "model_id", "geometry")],
        (line(without="ids"), "bits missing"),
        (line(bits=[["0"]]), "unknown bits"),
        (line(extra=1), "unknown extra"),
        *[(line(vocab_size=v), "vocab_size must be") for v in (0, -5, 2**62 + 1, 1.5, "10", None, True, [10])],
        *[(line(model_id=m), "model_id must be") for m in ("ff", "00000000000000FF", "0x000000000000ff", -1, 2**64, None, 1.0)],
        *[(line(geometry=g), "geometry") for g in ([], {}, "x", LINE["geometry"] | {"policy": []}, LINE["geometry"] | {"policy": "x"})],
        *[(line(geometry=LINE["geometry"] | {k: v}), "geometry") for k in ("height", "rows") for v in (0, -1, 70000, 1.0, True, "1", None)],
        (line(geometry=LINE["geometry"] | {"rows": 2}), "2 tiles under"),
        (line(geometry=LINE["geometry"] | {"policy": "tile", "rows": 2}), "1 rows where the geometry says 2"),
        (line(nested=1), "nested must be"),
        (line(meta=[]), "meta an object"),
        (f"{line()}\n{line(vocab_size=11)}", "line 2 comes from another model"),
        (f"{line()}\n{line(model_id='0' * 16)}", "line 2 comes from another model"),
        (f"{line(geometry=None, vocab_size=8, model_id='0' * 16)}\n{line(BIT_LINE)}", "another model"),
        (f"{line()}\n{line(geometry=None)}", "some images only"),
        (f"{line()}\n{line()[:-5]}", "line 2 is not valid JSON"),
        (line(BIT_LINE, bits=[["01", "11"]]), "3 characters"),
        (line(BIT_LINE, bits=[["012", "111"]]), "3 characters"),
        (line(BIT_LINE, bits=[["0١0", "111"]]), "3 characters"),
        (line(BIT_LINE, bits=[[10, 111]]), "3 characters"),
        (line(BIT_LINE, vocab_size=9), "vocab_size must be"),
        (line(BIT_LINE, vocab_size=2**256), "vocab_size must be"),
        ("\n\n", "is empty"),
    ],
)
def test_malformed_jsonl(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(TokFileError, match=message) as caught:
        read_tokens(path)
    assert len(str(caught.value)) < 600


def test_huge_lines_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_formats, "MAX_LINE", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text(line(ids=[[1] * 100_000], lengths=[100_000]))
    tracemalloc.start()
    with pytest.raises(TokFileError, match="longer than 1000 bytes"):
        read_tokens(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    with pytest.raises(TokenError, match=r"Store it as \.tok or \.npz"):
        write_tokens(TokenSequence(torch.zeros(1, 2000, dtype=torch.int64), 2), path)


ARRAYS = {
    "ids": np.array([[1, 2, 3], [9, 0, 0]], np.int16),
    "lengths": np.array([3, 1]),
    "vocab_size": np.int64(10),
    "model_id": np.uint64(5),
    "geometry": np.array([[3, 4, 1, 1, 1], [3, 4, 0, 1, 1]]),
}


def edited(without=(), **changes):
    return {k: np.asarray(v) for k, v in (ARRAYS | changes).items() if k not in without}


BAD_ARRAYS = [
    (edited(without=["ids"]), "bits, .*missing|bits missing"),
    (edited(without=["lengths"]), "lengths missing"),
    (edited(ids=ARRAYS["ids"] + 1), r"ids must be in \[0, 10\)"),
    (edited(ids=-ARRAYS["ids"]), r"ids must be in \[0, 10\)"),
    (edited(ids=ARRAYS["ids"].astype(np.uint64) * 2**60), "ids must be in"),
    (edited(ids=np.array([[1, 2, 3], [9, 0, 1]])), "beyond lengths must be zero"),
    (edited(ids=ARRAYS["ids"].astype(float)), "must hold integers"),
    (edited(ids=np.full((2, 3), np.nan)), "must hold integers"),
    (edited(ids=ARRAYS["ids"][0]), r"ids must be \(B, N\)"),
    (edited(ids=ARRAYS["ids"][None]), r"ids must be \(B, N\)"),
    (edited(ids=np.zeros((2, 0), np.int64), lengths=[0, 0]), "none empty"),
    (edited(ids=np.zeros((0, 3), np.int64), lengths=np.zeros(0, np.int64)), "none empty"),
    (edited(lengths=[3, 4]), "lengths must be in"),
    (edited(lengths=[3, 0]), "lengths must be in"),
    (edited(lengths=[3]), "lengths"),
    (edited(lengths=[[3], [1]]), "lengths"),
    (edited(lengths=[3.0, 1.0]), "must hold integers"),
    (edited(geometry=np.ones((2, 4), int)), r"geometry must be \(G, 5\)"),
    (edited(geometry=np.ones((3, 5), int)), "geometry describes 3 rows"),
    (edited(geometry=np.zeros((2, 5), int)), "geometry .* out of range"),
    (edited(geometry=[[3, 4, 9, 1, 1]] * 2), "geometry .* out of range"),
    (edited(geometry=[[3, 4, 1, 2, 1]]), "2 tiles under"),
    (edited(surprise=[1]), "surprise|other things"),
]
NPZ_ONLY = [
    (edited(without=["vocab_size"]), "vocab_size missing"),
    (edited(without=["model_id"]), "model_id missing"),
    (edited(vocab_size=0), "vocab_size must be"),
    (edited(vocab_size=[10, 10]), "single integer"),
    (edited(vocab_size=10.5), "must hold integers"),
    (edited(model_id=-1), "model_id must be"),
    (edited(nested=2), "nested must be 0 or 1"),
    (edited(ids=ARRAYS["ids"].astype(str)), "must hold integers"),
    (edited(without=["ids", "vocab_size"], bits=np.full((2, 3, 4), 2, np.uint8)), r"bits must be in \[0, 2\)"),
    (edited(without=["ids", "vocab_size"], bits=np.zeros((2, 3), np.uint8)), r"bits must be \(B, N, d\)"),
    (edited(without=["ids", "vocab_size"], bits=np.zeros((2, 3, 256), np.uint8)), r"bits must be \(B, N, d\)"),
    (edited(without=["ids"], bits=np.zeros((2, 3, 4), np.uint8)), "unknown vocab_size"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS + NPZ_ONLY)
def test_malformed_npz(tmp_path, arrays, message):
    path = tmp_path / "x.npz"
    np.savez(path, **edited())
    assert read_tokens(path).ids.tolist() == ARRAYS["ids"].tolist()
    np.savez(path, **arrays)
    with pytest.raises(TokFileError, match=message):
        read_tokens(path)


META = {"format": "tok1d.tokens/1", "vocab_size": "10", "model_id": "0000000000000005"}


@pytest.mark.parametrize(
    ("arrays", "meta", "message"),
    [
        *[(arrays, META, message) for arrays, message in BAD_ARRAYS],
        (edited(), {}, "format, model_id, vocab_size missing"),
        (edited(), META | {"more": "1"}, "unknown more"),
        (edited(), META | {"format": "pt"}, "format tok1d.tokens/1"),
        (edited(), META | {"nested": "yes"}, "nested 0 or 1"),
        *[(edited(), META | {"vocab_size": v}, "vocab_size must be") for v in ("", "ten", "-1", "0", "٣", "1" * 90, "1e3")],
        *[(edited(), META | {"model_id": m}, "model_id must be") for m in ("", "5", "x" * 16)],
    ],
)
def test_malformed_safetensors(tmp_path, arrays, meta, message):
    path = tmp_path / "x.safetensors"
    tensors = {k: np.ascontiguousarray(v) for k, v in arrays.items() if k not in ("vocab_size", "model_id")}
    path.write_bytes(save_safetensors(tensors, metadata=meta))
    with pytest.raises(TokFileError, match=message):
        read_tokens(path)


def test_pickled_arrays_are_never_loaded(tmp_path):
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    np.savez(tmp_path / "x.npz", **{**edited(), "ids": np.array([[Evil()]], dtype=object)})
    with pytest.raises(TokFileError, match="must hold integers, got object"):
        read_tokens(tmp_path / "x.npz")
    assert not flag.exists()


def npz(members: dict[str, bytes], **options) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npz({"ids.npy": bytes(64 << 20)}, compression=zipfile.ZIP_DEFLATED), "as zip bombs do"),
        (npz({f"{i}.npy": b"" for i in range(50)}), "other things than tokens"),
        (npz({"../ids.npy": b""}), "other things than tokens"),
        (npz({"ids.npy": b"", "ids": b""}), "not a whole npz file"),
        (npz({"ids.npy": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (4000000000, 256)}")}), "not a whole npz file"),
        (npz({"ids.npy": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 1)}", bytes(8))}), "must hold integers"),
        (npz({"ids.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8))}), "must hold integers"),
        (npz({"ids.npy": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1)}", bytes(9))}), "not a whole npz file"),
        (npz({"ids.npy": npy("__import__('os').getcwd()")}), "not a whole npz file"),
        (npz({"ids.npy": npy("(" * 117)}), "not a whole npz file"),
    ],
)
def test_hostile_npz(tmp_path, data, message):
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(TokFileError, match=message):
        read_tokens(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


def test_fortran_order_and_big_endian_arrays_are_understood(tmp_path):
    np.savez(tmp_path / "x.npz", **edited(ids=np.asfortranarray(ARRAYS["ids"]).astype(">i4"), nested=0))
    seq = read_tokens(tmp_path / "x.npz")
    assert seq.ids.tolist() == ARRAYS["ids"].tolist() and seq.nested is False and seq.model_id == 5
