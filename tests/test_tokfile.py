"""The .tok container: exact round trips, prefixes, every kind of damage, streams, and files that must open for ever."""

import importlib.util
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tok1d import disk, tokfile
from tok1d.bitpack import pack_ids, packed_size, unpack_ids
from tok1d.errors import TokenError, TokError, TokFileError
from tok1d.tokens import Geometry, TokenSequence

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "tok_v1"
HEADER = struct.Struct("<4sBBBBIIHHHBBQ")
FIELDS = ("magic", "version", "flags", "bits", "policy", "tokens", "vocab", "height", "width", "frames", "rows", "cols", "model_id")


def make(tokens: int = 4, vocab: int = 4096, rows: int = 1, **kwargs) -> TokenSequence:
    ids = (torch.arange(rows * tokens) * 2654435761 % vocab).view(rows, tokens)
    return TokenSequence(ids, vocab, **kwargs)


def same(a: TokenSequence, b: TokenSequence) -> bool:
    plain = lambda s: (s.vocab_size, s.model_id, s.geometry, s.nested, s.bits is None, s.lengths.tolist())  # noqa: E731
    return plain(a) == plain(b) and torch.equal(a.data, b.data)


def forge(data: bytes, extra: bytes | None = None, payload: bytes | None = None, **fields) -> bytes:
    """A record with other header fields and a CRC that agrees, as a hostile writer would make it."""
    header = dict(zip(FIELDS, HEADER.unpack(data[:32]))) | fields
    body = HEADER.pack(*(header[f] for f in FIELDS)) + (extra or b"") + (data[32:-4] if payload is None else payload)
    return body + struct.pack("<I", zlib.crc32(body))


def reference_reader(data: bytes) -> list[dict]:
    """Version 1 as docs/tok-format.md tells it, bit by bit; shares no code with tok1d."""
    found, at = [], 0
    while at < len(data):
        start, h = at, dict(zip(FIELDS, HEADER.unpack(data[at : at + 32])))
        at, vocab, meta = at + 32, h["vocab"] or 2 ** h["bits"], {}
        if h["flags"] & 8:
            vocab, at = int.from_bytes(data[at : at + 8], "little"), at + 8
        if h["flags"] & 1:
            size = int.from_bytes(data[at : at + 4], "little")
            meta, at = json.loads(data[at + 4 : at + 4 + size]), at + 4 + size
        size, tiles = -(-h["tokens"] * h["bits"] // 8), h["rows"] * h["cols"]
        stream = "".join(f"{byte:08b}" for byte in data[at : at + size])
        words = [stream[i * h["bits"] : (i + 1) * h["bits"]] for i in range(h["tokens"])]
        at += size
        assert int.from_bytes(data[at : at + 4], "little") == zlib.crc32(data[start:at])
        at += 4
        rows = [words[t::tiles] for t in range(tiles)]
        policy = ["none", "resize", "crop", "pad", "tile"][h["policy"]]
        found.append(
            {
                **({"bits": rows} if h["flags"] & 4 else {"ids": [[int(w, 2) for w in row] for row in rows]}),
                "bits_per_token": h["bits"],
                "vocab_size": vocab,
                "model_id": f"{h['model_id']:016x}",
                "geometry": [h["height"], h["width"], policy, h["rows"], h["cols"]] if h["height"] else None,
                "frames": h["frames"],
                "nested": bool(h["flags"] & 2),
                "meta": meta,
                "nbytes": at - start,
                "payload_bits": h["tokens"] * h["bits"],
            }
        )
    return found


# cost and round trips ------------------------------------------------------------------------------------------------


def test_32_tokens_of_12_bits_cost_84_bytes():
    data = tokfile.pack(make(32, 4096, geometry=(Geometry(256, 256),), model_id=2**64 - 1))
    record = tokfile.unpack(data)[0]
    assert (len(data), record.nbytes, record.payload_bits) == (84, 84, 32 * 12)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 62), st.integers(0, 70), st.randoms(use_true_random=False))
def test_bit_packing_matches_arithmetic(bits, count, random):
    ids = [random.randrange(2**bits) for _ in range(count)]
    data = pack_ids(np.array(ids, np.int64), bits)
    number = 0
    for i in ids:
        number = number << bits | i
    assert data == (number << (-count * bits % 8)).to_bytes(packed_size(count, bits), "big")
    assert unpack_ids(data, count, bits).tolist() == ids


@pytest.mark.parametrize("bits", [1, 12, 13, 62])
@pytest.mark.parametrize("count", [65535, 65536, 65537, 200_001])
def test_bit_packing_across_blocks(bits, count):
    ids = np.random.default_rng(0).integers(0, 2**bits, count)
    data = pack_ids(ids, bits)
    assert len(data) == packed_size(count, bits) and np.array_equal(unpack_ids(data, count, bits), ids)


@st.composite
def sequences(draw):
    """Any sequence a .tok file can hold: ids of 1..62 bits or codes of 1..255, tiles, geometry, lengths."""
    code = draw(st.booleans())
    d = draw(st.integers(1, 255 if code else 62))
    vocab = 2**d if code or draw(st.booleans()) else draw(st.integers(2 ** (d - 1) + (d > 1), 2**d))
    geometry = None
    if draw(st.booleans()):
        geometry = []
        for _ in range(draw(st.integers(1, 3))):
            policy = draw(st.sampled_from(["none", "resize", "crop", "pad", "tile"]))
            rows, cols = (draw(st.integers(1, 3)), draw(st.integers(1, 3))) if policy == "tile" else (1, 1)
            geometry.append(Geometry(draw(st.integers(1, 65535)), draw(st.integers(1, 65535)), policy, rows, cols))
        tiles = [g.tiles for g in geometry]
    else:
        tiles = [1] * draw(st.integers(1, 4))
    lengths = [n for t in tiles for n in [draw(st.integers(1, 20))] * t]
    rng, n = np.random.default_rng(draw(st.integers(0, 2**32))), max(lengths)
    shape, top = ((len(lengths), n, d), 2) if code else ((len(lengths), n), vocab)
    data = torch.from_numpy(rng.integers(0, top, shape, dtype=np.uint8 if code else np.int64))
    data[torch.arange(n) >= torch.tensor(lengths)[:, None]] = 0
    return TokenSequence(
        ids=None if code else data,
        bits=data if code else None,
        lengths=torch.tensor(lengths),
        vocab_size=vocab,
        model_id=draw(st.integers(0, 2**64 - 1)),
        geometry=None if geometry is None else tuple(geometry),
        nested=draw(st.booleans()),
    )


metas = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(sequences(), metas)
def test_round_trip(seq, meta):
    data = tokfile.pack(seq, meta)
    records = tokfile.unpack(data)
    assert same(tokfile.to_sequence(records), seq)
    assert all(r.meta == meta and r.frames == 1 for r in records)
    assert sum(r.nbytes for r in records) == len(data) and [r.payload_bits for r in records] == seq.bits_per_image
    assert b"".join(r.to_bytes() for r in records) == data
    assert [r["nbytes"] for r in reference_reader(data)] == [r.nbytes for r in records]


@settings(max_examples=100, deadline=None)
@given(sequences(), st.integers(1, 20))
def test_truncation_is_a_prefix_of_the_payload(seq, k):
    seq, longest = replace(seq, nested=True), max(seq.lengths.tolist())
    if k > longest:
        with pytest.raises(TokenError, match=f"ask for 1 to {longest}"):
            tokfile.truncate(tokfile.pack(seq), k)
        return
    short = tokfile.truncate(tokfile.pack(seq), k)
    assert short == tokfile.pack(seq[:, :k])
    for old, new in zip(tokfile.unpack(tokfile.pack(seq)), tokfile.unpack(short)):
        assert tokfile.truncate(old, min(k, old.tokens)) == new.to_bytes()
        whole, part = ((r.payload_bits + 7) // 8 for r in (old, new))
        before, after = old.to_bytes()[-4 - whole : -4], new.to_bytes()[-4 - part : -4]
        assert before.startswith(after[:-1])
        keep = 0xFF << (-new.payload_bits % 8) & 0xFF
        assert after[-1] == before[part - 1] & keep


@pytest.mark.parametrize("tokens", [0, -1, 5, True, 2.0, None])
def test_truncate_refuses_other_counts(tokens):
    with pytest.raises(TokenError, match="ask for 1 to 4"):
        tokfile.truncate(tokfile.pack(make(4)), tokens)


def test_truncate_refuses_models_of_fixed_length_and_keeps_the_rest():
    with pytest.raises(TokFileError, match="tok models --filter nested"):
        tokfile.truncate(tokfile.pack(make(4), nested=False), 2)
    record = tokfile.unpack(tokfile.truncate(tokfile.pack(make(4, model_id=9), {"a": 1}, frames=17), 2))[0]
    assert (record.frames, record.meta, record.model_id, record.tokens) == (17, {"a": 1}, 9, 2)


def test_a_million_tokens():
    seq = make(1 << 20, 2**17)
    tracemalloc.start()
    data = tokfile.pack(seq)
    back = tokfile.unpack(data)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(back.ids, seq.ids.numpy()) and peak < 64 << 20  # ids alone are 8 MB


@pytest.mark.parametrize(
    ("seq", "message"),
    [
        (make(0), "at least 1 token"),
        (make(4, rows=0), "nothing to store"),
        (make(4, vocab=2**62 + 1), "63 bits per token"),
        (TokenSequence(torch.tensor([[4]]), 4), "ids outside"),
        (TokenSequence(torch.tensor([[-1]]), 4), "ids outside"),
        (TokenSequence(torch.tensor([[0]]), 0), "a vocabulary of 0"),
        (TokenSequence(None, 8, bits=torch.full((1, 1, 3), 2, dtype=torch.uint8)), "bits other than 0 and 1"),
        (TokenSequence(None, 9, bits=torch.zeros(1, 1, 3, dtype=torch.uint8)), "must be 2\\*\\*3"),
        (TokenSequence(None, 2**256, bits=torch.zeros(1, 1, 256, dtype=torch.uint8)), "256 bits per token"),
        (make(geometry=(Geometry(65536, 9),)), "up to 65535"),
        (make(geometry=(Geometry(9, -1),)), "up to 65535"),
        (make(geometry=(Geometry(0, 0),)), "original size of 0 × 0"),
        (make(geometry=(Geometry(9, 9, "stretch"),)), "unknown size policy"),
        (make(rows=2, geometry=(Geometry(9, 9, "pad", 1, 2),)), "2 tiles under the size policy 'pad'"),
        (make(1, rows=256, geometry=(Geometry(9, 9, "tile", 256, 1),)), "256 × 1 tiles"),
        (make(rows=2, geometry=(Geometry(9, 9, "tile", 1, 2),), lengths=torch.tensor([1, 2])), "same number of tokens"),
        (make(lengths=torch.tensor([0])), "at least 1 token"),
        (make(lengths=torch.tensor([5])), "at most 4"),
        (make(model_id=2**64), "model id"),
        (make(model_id=-1), "model id"),
    ],
)
def test_pack_refuses_what_does_not_fit(seq, message):
    with pytest.raises(TokenError, match=message):
        tokfile.pack(seq)


@pytest.mark.parametrize("meta", [{"a": float("nan")}, {"a": object()}, {"a": "x" * (1 << 20)}, {(1, 2): 3}, [{}, {}], ["ab"]])
def test_pack_refuses_other_meta(meta):
    with pytest.raises(TokenError, match="meta"):
        tokfile.pack(make(), meta)


def test_one_meta_per_image():
    records = tokfile.unpack(tokfile.pack(make(rows=2), [{"name": "a"}, {}]))
    assert [r.meta for r in records] == [{"name": "a"}, {}] and records[0].nbytes == records[1].nbytes + 4 + 12


# damage --------------------------------------------------------------------------------------------------------------

SMALL = tokfile.pack(make(5, 1000, rows=2, geometry=(Geometry(300, 400, "pad"), Geometry(7, 9)), model_id=3), [{"n": 1}, {}])


def test_every_truncation_point_is_an_error():
    cut = len(SMALL) - tokfile.unpack(SMALL)[1].nbytes
    for size in range(len(SMALL)):
        if size != cut:  # where the first record ends, a shorter file is whole
            with pytest.raises(TokFileError):
                tokfile.unpack(SMALL[:size])


def test_every_change_of_a_byte_is_an_error():
    for at in range(len(SMALL)):
        for value in set(range(256)) - {SMALL[at]}:
            with pytest.raises(TokFileError):
                tokfile.unpack(SMALL[:at] + bytes([value]) + SMALL[at + 1 :])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([b"", b"TOK1", b"TOK1\x01", SMALL[:8], SMALL[:32]]))
def test_random_bytes_are_an_error(noise, start):
    with pytest.raises(TokFileError):
        tokfile.unpack(start + noise)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_forged_checksums_give_a_record_or_an_error(changes):
    """Whatever a hostile writer puts under a valid CRC: a valid record or a TokFileError, nothing else."""
    first = tokfile.unpack(SMALL)[0].nbytes
    data = bytearray(SMALL[: first - 4])
    for at, value in changes:
        data[at % len(data)] = value
    data += struct.pack("<I", zlib.crc32(data))
    try:
        for record in tokfile.unpack(bytes(data)):
            assert record.ids is None or 0 <= record.ids.min() <= record.ids.max() < record.vocab_size
            assert record.to_bytes()
    except TokFileError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG image; tok encode"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "JPEG image; tok encode"),
        (b"RIFF1234WEBPVP8 ", "WebP image; tok encode"),
        (b"GIF89a", "GIF image; tok encode"),
        (b"PK\x03\x04" + bytes(40), "name it .npz"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b'{"ids": [1]}', "name it .jsonl"),
        (b"hello world, this is some text of more than 32 bytes", "not a .tok file"),
        (bytes(1000), "not a .tok file"),
        (b"TOK", "ends inside its header"),
        (b"TOK1\x02" + bytes(27), "version 2 .* reads version 1. Upgrade"),
        (SMALL + b"\n", "not a record follows record 2"),
        (SMALL + SMALL[:40], "record 3 ends inside its"),
        (SMALL + bytes(32), "not a record follows record 2"),
    ],
)
def test_foreign_and_trailing_bytes(data, message):
    with pytest.raises(TokFileError, match=message):
        tokfile.unpack(data)


PLAIN = tokfile.pack(make(4, 1000, geometry=(Geometry(300, 400, "pad"),)))
CODES = tokfile.pack(TokenSequence(None, 2**9, bits=torch.ones(1, 4, 9, dtype=torch.uint8)))


def json_block(block: bytes, size: int | None = None) -> bytes:
    return forge(PLAIN, struct.pack("<I", len(block) if size is None else size) + block, flags=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (forge(PLAIN, flags=16), "unknown flags 0x10"),
        (forge(PLAIN, flags=130), "unknown flags"),
        (forge(PLAIN, bits=0, vocab=0), "0 bits per token"),
        (forge(PLAIN, bits=63, vocab=0), "63 bits per token"),
        (forge(CODES, bits=0), "0 bits per token"),
        (forge(PLAIN, policy=5), "unknown size policy"),
        (forge(PLAIN, policy=255), "unknown size policy"),
        (forge(PLAIN, tokens=0, payload=b""), "0 tokens"),
        (forge(PLAIN, rows=0), "0 × 1 tiles"),
        (forge(PLAIN, rows=0, cols=0), "0 × 0 tiles"),
        (forge(PLAIN, rows=3, policy=4), "4 tokens, which 3 tiles cannot share"),
        (forge(PLAIN, rows=2), "2 tiles under the size policy 'pad'"),
        (forge(PLAIN, vocab=2000), "vocabulary of 2000 in ids of 10 bits"),
        (forge(PLAIN, vocab=512), "vocabulary of 512"),
        (forge(PLAIN, vocab=1024), "vocabulary of 1024"),
        (forge(PLAIN, vocab=int(make(4, 1000).ids.max())), "outside the vocabulary"),
        (forge(CODES, vocab=300), "vocabulary for bit codes"),
        (forge(PLAIN, flags=10), "two vocabularies"),
        (forge(CODES, flags=12), "two vocabularies"),
        (forge(PLAIN, struct.pack("<Q", 1000), flags=10, vocab=0), "vocabulary of 1000"),
        (forge(PLAIN, struct.pack("<Q", 2**64 - 1), flags=10, vocab=0, bits=62), "vocabulary of 18446744073709551615"),
        (forge(PLAIN, flags=10, vocab=0, payload=b""), "ends inside its vocabulary"),
        (forge(PLAIN, height=0), "original size of 0 × 400"),
        (forge(PLAIN, width=0), "original size of 300 × 0"),
        (forge(PLAIN, height=0, width=0), "size policy without an original size"),
        (forge(PLAIN, frames=0), "0 frames"),
        (forge(PLAIN, payload=b"\xff" * 5), "outside the vocabulary"),
        (forge(tokfile.pack(make(3, 4096)), payload=b"\0\0\0\0\x01"), "unused bits .* not zero"),
        (json_block(b"[1]"), "must be a JSON object, got list"),
        (json_block(b"null"), "must be a JSON object"),
        (json_block(b""), "not valid JSON"),
        (json_block(b'{"a": NaN}'), "not valid JSON"),
        (json_block(b'{"a": 1e999}'), "not valid JSON"),
        (json_block(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (json_block(b'{"a": "\xff"}'), "not valid JSON"),
        (json_block(b'{"a":' + b"[" * 200_000), "not valid JSON"),
        (json_block(b"{}", size=(1 << 20) + 1), "JSON block of 1048577 bytes"),
        (json_block(b"{}", size=2**32 - 1), "JSON block of 4294967295 bytes"),
        (json_block(b"{}", size=1000), "ends inside its JSON block"),
    ],
)
def test_what_a_hostile_writer_may_claim(data, message):
    with pytest.raises(TokFileError, match=message):
        tokfile.unpack(data)


@pytest.mark.parametrize(
    "fields", [{"tokens": 2**32 - 1}, {"tokens": 2**24}, {"tokens": 2**22, "bits": 255, "vocab": 0, "flags": 6}, {"tokens": 2**24, "bits": 62, "vocab": 0}]
)  # fmt: skip
def test_a_lying_header_costs_nothing(fields):
    data = forge(PLAIN, **fields)
    tracemalloc.start()
    with pytest.raises(TokFileError):
        tokfile.unpack(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


def test_a_lying_header_is_read_in_bounded_pieces():
    class Watched(io.BytesIO):
        def read(self, size=-1):  # a buffered file allocates what it is asked for
            assert 0 < size <= 1 << 20
            return super().read(size)

    with pytest.raises(TokFileError, match="ends inside its tokens"):
        list(tokfile.iter_records(Watched(forge(PLAIN, tokens=2**24))))


def test_padding_does_not_multiply_memory():
    long, short = (tokfile.Record(np.zeros((1, n), np.int64), None, 2) for n in (1 << 20, 1))
    with pytest.raises(TokFileError, match="iter_records"):
        tokfile.to_sequence([long, *[short] * 1000])


def test_to_sequence_refuses_mixtures():
    records = [tokfile.unpack(tokfile.pack(s))[0] for s in (make(), make(model_id=1), make(geometry=(Geometry(1, 1),)))]
    for pair, message in ((records[:2], "different models"), (records[::2], "original size"), ([], "no records")):
        with pytest.raises(TokFileError, match=message):
            tokfile.to_sequence(pair)


# streams and files ---------------------------------------------------------------------------------------------------


def test_records_arrive_through_a_pipe_one_by_one():
    end, start = os.pipe()
    first = tokfile.pack(make(300, 4096), {"name": "one"})
    second = tokfile.pack(make(100_000, 4096))

    def write() -> None:
        with os.fdopen(start, "wb", buffering=0) as pipe:
            for at in range(0, len(first), 7):  # a raw pipe gives short reads
                pipe.write(first[at : at + 7])
            assert seen.wait(20)
            pipe.write(second)

    seen, writer = threading.Event(), threading.Thread(target=write, daemon=True)
    writer.start()
    with os.fdopen(end, "rb", buffering=0) as pipe:
        records = tokfile.iter_records(pipe)
        assert next(records).meta == {"name": "one"}  # before the second was written
        seen.set()
        assert next(records).tokens == 100_000 and next(records, None) is None
    writer.join()


def test_streams_that_fail():
    class Broken(io.RawIOBase):
        def __init__(self, reply):
            self.reply = reply

        def read(self, size=-1):
            if self.reply is None:
                return None
            raise self.reply

    for reply, message in ((OSError(5, "Input/output error"), "Input/output error"), (None, "non-blocking")):
        with pytest.raises(TokFileError, match=message):
            list(tokfile.iter_records(Broken(reply)))


def test_standard_input_and_output():
    code = "from tok1d import tokfile; print(tokfile.save(tokfile.load('-'), '-'), file=__import__('sys').stderr)"
    done = subprocess.run([sys.executable, "-c", code], input=PLAIN, capture_output=True, check=True)
    assert done.stdout == PLAIN and int(done.stderr) == len(PLAIN)


def test_save_and_load(tmp_path):
    seq, path = make(5, 1000, rows=2, geometry=(Geometry(3, 4), Geometry(5, 6, "crop"))), tmp_path / "a.tok"
    assert tokfile.save(seq, path, meta={"x": 1}) == path.stat().st_size
    assert same(tokfile.load(path), seq) and [r.meta for r in tokfile.iter_file(path)] == [{"x": 1}] * 2
    with pytest.raises(TokError, match=r"exists already.*-f"):
        tokfile.save(seq, path, overwrite=False)
    tokfile.save(seq[:, :2], str(path))
    assert tokfile.load(str(path)).shape == (2, 2) and os.listdir(tmp_path) == ["a.tok"]


@pytest.mark.parametrize("name", ["missing.tok", ".", "a\0b.tok"])
def test_load_names_the_path_that_cannot_be_read(tmp_path, name):
    with pytest.raises(TokFileError, match="cannot be read"):
        tokfile.load(f"{tmp_path}/{name}")


def test_messages_name_the_file(tmp_path):
    (tmp_path / "x.tok").write_bytes(SMALL[:-1])
    with pytest.raises(TokFileError, match=r"x\.tok: record 2 ends inside its checksum"):
        tokfile.load(tmp_path / "x.tok")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, failure):
    path = tmp_path / "a.tok"
    path.write_bytes(b"old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(disk.os, step, fail)
    expected = TokError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        tokfile.save(make(), path)
    if expected is TokError:
        assert "a.tok cannot be written: No space left on device" in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.tok"]


def test_a_file_size_limit_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.tok"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses what goes beyond, as a full disk does
    try:
        with pytest.raises(TokError, match="File too large"):
            tokfile.atomic_write(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.tok"]


def test_atomic_write_names_path_and_cause(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "a.tok", tmp_path / "folder", tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(TokError, match=r"cannot be written: \w"):
            tokfile.atomic_write(path, b"x")
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


def test_atomic_write_follows_links_and_leaves_devices_alone(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tokfile.atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    tokfile.atomic_write("/dev/null", b"x")
    assert not Path("/dev/null").is_file()
    if os.path.exists("/dev/full"):
        with pytest.raises(TokError, match="No space left"):
            tokfile.atomic_write("/dev/full", b"x")


# for ever ------------------------------------------------------------------------------------------------------------

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def test_golden_folder_is_complete():
    assert sorted(EXPECTED) == sorted(p.name for p in GOLDEN.glob("*.tok")) and len(EXPECTED) == 10


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_files_open_for_ever(name):
    data, expected = (GOLDEN / name).read_bytes(), EXPECTED[name]
    assert reference_reader(data) == expected["records"]
    records = list(tokfile.iter_file(GOLDEN / name))
    assert len(records) == len(expected["records"])
    for r, e in zip(records, expected["records"]):
        tokens = r.ids.tolist() if "ids" in e else [["".join(map(str, t)) for t in tile] for tile in r.bits.tolist()]
        assert tokens == e.get("ids", e.get("bits"))
        assert (r.vocab_size, f"{r.model_id:016x}", r.frames, r.nested, r.meta) == (
            e["vocab_size"], e["model_id"], e["frames"], e["nested"], e["meta"],
        )  # fmt: skip
        g = r.geometry
        assert (g and [g.height, g.width, g.policy, g.rows, g.cols]) == e["geometry"]
        assert (r.nbytes, r.payload_bits, r.bits_per_token) == (e["nbytes"], e["payload_bits"], e["bits_per_token"])
    assert b"".join(r.to_bytes() for r in records) == data


def test_golden_script_makes_the_same_files_and_overwrites_none():
    spec = importlib.util.spec_from_file_location("make_golden_tok", ROOT / "scripts" / "make_golden_tok.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, data in script.files().items():
        assert data == (GOLDEN / name).read_bytes() and script.describe(data) == EXPECTED[name]
    with pytest.raises(SystemExit, match="never overwritten"):
        script.main()


def test_the_example_of_the_document():
    text = (ROOT / "docs" / "tok-format.md").read_text()
    block = re.search(r"```hex\n(.*?)```", text, re.S)[1]
    data = bytes.fromhex("".join(re.match(r"(?:[0-9a-f]{2} {1,2})+", line)[0] for line in block.splitlines()))
    seq = TokenSequence(torch.tensor([[0xABC, 0x123, 0xFFF]]), 4096, model_id=0x0123456789ABCDEF, geometry=(Geometry(480, 640, "crop"),))
    assert data == tokfile.pack(seq, {"name": "a"}) and len(data) == 57
    short = tokfile.truncate(data, 1)
    assert short[-6:-4].hex(" ") == "ab c0" and f"{int.from_bytes(short[-4:], 'little'):08x}" == "16ae853d"
