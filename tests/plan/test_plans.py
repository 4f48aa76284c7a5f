"""Plans: their ids, file names and digests, which are in the keys of stored stages and must not change."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.plan.plans import ChannelPlan, Plan, WeightPlan
from mm_edge.records import Assignment, candidate_id, file_name

ASSIGNMENT = Assignment("product", ("balanced", "middle_50th"), {"w": 0.5})
KEEP = {3: np.arange(9) < 4, 12: np.arange(5) < 2}
MASKS = {"b": np.arange(6).reshape(2, 3) % 2 == 0, "a": np.ones(3, bool)}


@pytest.mark.parametrize(
    ("plan", "name", "file", "digest"),
    [
        (
            ChannelPlan(ASSIGNMENT, KEEP, ("x",), side=96, planned_by="counted"),
            "product/balanced/structured/fp32@96",
            "product-balanced-structured-fp32-96px",
            "586b17e348d0524fc35df8eba3e49c397f9d1c32bd20ce988707a8c859cce5d9",
        ),
        (
            ChannelPlan(ASSIGNMENT, {}),
            "product/balanced/structured/fp32",
            "product-balanced-structured-fp32",
            "9a936c20c4a0b11fff6da1d75eadb8ea4223724917fb528416e1cf548364d3ac",
        ),
        (
            WeightPlan(ASSIGNMENT, "n:m", MASKS),
            "product/balanced/n:m/fp32",
            "product-balanced-n_m-fp32",
            "f63153a732f05a698e97772f24b25147cef457463e44f67ad172b2437ca62d5d",
        ),
        (
            WeightPlan(ASSIGNMENT, "unstructured", MASKS),
            "product/balanced/unstructured/fp32",
            "product-balanced-unstructured-fp32",
            "59e3e3f022e1b185b5426aeed79195eea2c9f096713f78b305915dc25c6e7274",
        ),
    ],
)
def test_names_and_digests_stay(plan: Plan, name: str, file: str, digest: str) -> None:
    assert (plan.id, plan.file_name, plan.digest()) == (name, file, digest)


@pytest.mark.parametrize(
    ("precision", "side", "name", "file"),
    [
        ("fp32", None, "dense/fp32", "dense-fp32"),
        ("fp32", 96, "dense@96", "dense-96px"),
        ("int8", None, "dense/int8", "dense-int8"),
        ("int8", 96, "dense/int8@96", "dense-int8-96px"),
    ],
)
def test_names_of_the_dense_network(precision: str, side: int | None, name: str, file: str) -> None:
    assert candidate_id("none", "dense", "dense", precision, side) == name
    assert file_name("none", "dense", "dense", precision, side) == file
