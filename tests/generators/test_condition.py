"""Class conditions and none at all: rows of the table, dropped rows, names."""

import pytest
import torch

from tok1d.errors import TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import ClassCondition, Given, Unconditional


def attached(condition, **kinds):
    condition.attach(6, **kinds)
    return condition


def test_classes_are_rows_of_a_table_and_none_is_the_last():
    condition = attached(ClassCondition(3), vector=True)
    table = condition.table.weight
    given = condition({"label": torch.tensor([2, -1])}, 2)
    assert given.tokens.shape == (2, 1, 6) and condition.places == 1 and given.mask is None
    assert torch.equal(given.vector, table[[2, 3]]) and torch.equal(given.tokens[:, 0], table[[2, 3]])
    assert torch.equal(condition.null(2).vector, table[[3, 3]])
    only = attached(ClassCondition(3), tokens=False, vector=True)
    assert only({"label": torch.tensor([0])}, 1).tokens is None and only.places == 0


def test_training_drops_the_class_at_its_rate():
    condition = attached(ClassCondition(3, drop=0.25))
    label = torch.arange(4000) % 3
    given = condition({"label": label}, 4000, Chance(4000, torch.Generator().manual_seed(0)))
    dropped = (given.tokens[:, 0] == condition.table.weight[3]).all(1)
    assert 0.22 < dropped.float().mean() < 0.28
    assert torch.equal(given.tokens[~dropped, 0], condition.table.weight[label[~dropped]])


def test_asking_by_name_and_number():
    condition = ClassCondition(3, ["cat", "dog", "owl"])
    assert condition.request(2, "owl")["label"].tolist() == [2, 2]
    assert condition.request(3, ["cat", 1, -1])["label"].tolist() == [0, 1, -1]
    assert condition.request(2, torch.tensor([1, 2]))["label"].tolist() == [1, 2]
    with pytest.raises(TokenError, match="the classes are cat, dog, owl"):
        condition.request(1, "fox")
    for wrong in (1.5, True, None, [None]):
        with pytest.raises(TokenError):
            condition.request(1, wrong)


def test_joined_rows():
    a, b = Given(torch.zeros(2, 1, 3), None, torch.ones(2, 1)), Given(torch.ones(2, 1, 3), torch.ones(2, 3), torch.zeros(2, 1))
    joined = a.join(b)
    assert joined.tokens[:, 0, 0].tolist() == [0, 0, 1, 1] and joined.vector is None and joined.mask[:, 0].tolist() == [1, 1, 0, 0]


def test_nothing_asked_for():
    condition = attached(Unconditional(), vector=True)
    assert condition({}, 3).vector.shape == (3, 6) and condition.null(3) is None and not condition.guidable
    assert attached(Unconditional())({}, 3) == Given()


@pytest.mark.parametrize("build", [lambda: ClassCondition(2, ["one"]), lambda: ClassCondition(2, drop=1.5), lambda: ClassCondition(0)])
def test_bad_arguments(build):
    with pytest.raises(Exception, match=r"names must be 2|probability|classes must be"):
        build()


def test_labels_of_another_shape():
    condition = attached(ClassCondition(3))
    with pytest.raises(TokenError, match=r"label must be \(2,\)"):
        condition({"label": torch.zeros(3, dtype=torch.int64)}, 2)
