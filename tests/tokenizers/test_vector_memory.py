"""Vector quantizers never hold the table of all tokens and codes; benchmarks/vq_memory.py measures them at full size."""

import json
import sys

import pytest

from benchmarks.record import run
from benchmarks.vq_memory import CASES, CODES, LIMIT_MIB, TOKENS, tensors_mib


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("ibq")])
def test_a_table_of_scores_is_never_held(name):
    """Six images: 96 MiB of scores. What is held is one piece of 16 MiB and a few tensors of the codebook's 2 MiB."""
    assert 6 * TOKENS * CODES * 4 / 2**20 == 96
    assert tensors_mib(name, images=6, dim=8) < 60


@pytest.mark.parametrize("name", ["ibq", "ibq_entropy"])
def test_index_backpropagation_in_pieces(name):
    """Three images: 48 MiB of scores, several times over if written out. Two pieces of 8 MiB are held."""
    assert tensors_mib(name, images=3, dim=8) < 36


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_within_the_limit_at_full_size(name):
    """16,384 tokens over 65,536 codes of width 16, by torch's count and by the system's."""
    command = [sys.executable, "-m", "benchmarks.vq_memory", "--here", "--cases", name]
    (row,) = json.loads(run(command).output)
    assert max(row["tensors_mib"], row["resident_mib"]) < LIMIT_MIB
