"""The table of weight types: complete, and every name in it leads somewhere."""

from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from baichuan.config import WEIGHT_TYPES
from baichuan.errors import UnsupportedError
from baichuan.executors.cpu.reference_linear import linear
from baichuan.parallel.comm import Solo
from baichuan.records import DenseWeight, Weight
from baichuan.weights.types import TYPES, product_of

EXECUTORS = ("reference", "cpu", "cuda", "tensorrt")


def test_every_record_has_an_entry_and_every_entry_a_name_in_the_configuration():
    assert {each.record for each in TYPES.values()} == set(get_args(Weight))
    assert tuple(TYPES) == WEIGHT_TYPES


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_product_is_found(name, executor):
    product = product_of(object.__new__(TYPES[name].record), executor)
    assert callable(product) and product.__module__.startswith("baichuan.executors.")


def test_no_two_types_share_a_product():
    products = [name for each in TYPES.values() for name in each.products.values()]
    assert len(set(products)) == len(products) == len(TYPES) * len(EXECUTORS)


def test_another_type_or_executor_is_refused():
    @dataclass(frozen=True)
    class Other:
        weight: torch.Tensor

    x = torch.ones(1, 2)
    with pytest.raises(UnsupportedError, match="reference executor has no linear for Other"):
        linear(x, Other(x), torch.float32, Solo())
    with pytest.raises(UnsupportedError, match="abacus executor has no linear for DenseWeight"):
        product_of(DenseWeight(x), "abacus")
