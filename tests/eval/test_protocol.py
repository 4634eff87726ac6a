from dataclasses import asdict, replace

import pytest

from tok1d.errors import UsageError
from tok1d.eval.binned import Bins
from tok1d.eval.protocol import PROTOCOLS, conditions, differences, protocol, require_same


def test_every_protocol_is_found_by_its_id_and_has_bins():
    assert len(PROTOCOLS) == 9 and {p.size for p in PROTOCOLS.values()} == {256, 512, 1024}
    for name, p in PROTOCOLS.items():
        assert protocol(name) is p and p.id == name
        assert Bins.named(p.text_bins).name == f"text-v1-{p.size}" and Bins.named(p.face_bins).name == f"face-v2-{p.size}"
    with pytest.raises(UsageError, match="unknown protocol 'recon256'; there are recon256-v1, fit256-v1"):
        protocol("recon256")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fit", "stretch", "fit is crop or pad, got 'stretch'"),
        ("resample", "nearest", "resample is bicubic or lanczos"),
        ("space", "view", "space is model or original"),
        ("space", "original", "cannot be brought back"),
        ("size", 0, "at least 1 pixel"),
    ],
)
def test_impossible_protocols_are_refused(field, value, message):
    with pytest.raises(UsageError, match=message):
        replace(protocol("recon256-v1"), **{field: value})


def test_differences_are_spelt_out_to_the_last():
    a = conditions(protocol("recon256-v1"), data={"name": "x", "hash": "1"}, net="n")
    b = conditions(protocol("tokbench256-v1"), data={"name": "x", "hash": "2"})
    found = differences(a, b)
    assert "protocol.fit: crop ≠ pad" in found and "protocol.resample: bicubic ≠ lanczos" in found
    assert "data.hash: 1 ≠ 2" in found and "net: n ≠ (absent)" in found
    assert len(found) == 2 + sum(asdict(protocol("recon256-v1"))[k] != v for k, v in asdict(protocol("tokbench256-v1")).items())
    assert differences(a, a) == [] and sorted(differences(b, a)) != sorted(found)


def test_numbers_of_two_protocols_are_not_mixed():
    a, b = conditions(protocol("recon256-v1")), conditions(protocol("fit256-v1"))
    require_same(a, dict(a))
    with pytest.raises(UsageError, match=r"ours and theirs were measured differently .*protocol\.fit: crop ≠ pad; protocol\.id: recon256-v1 ≠ fit256-v1"):
        require_same(a, b, ("ours", "theirs"))
