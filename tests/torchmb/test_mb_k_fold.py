"""The example of cross-validation: folds do not overlap, and models see nothing of what they hold out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

EXAMPLE = Path(__file__).parents[2] / "examples" / "k_fold.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("k_fold", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


k_fold = load()


@given(st.integers(2, 40), st.data())
def test_any_folds_part_the_rows(rows: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, rows))
    train, held_out = k_fold.folds(rows, k)
    assert held_out.shape == (k, rows // k) and len(held_out.unique()) == held_out.numel()
    for own, others in zip(held_out.tolist(), train.tolist(), strict=True):
        assert sorted(own + others) == list(range(rows))


def test_more_folds_than_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"3 rows, got 4"):
        k_fold.folds(3, 4)


def test_cross_validation_is_that_of_models_trained_fold_by_fold() -> None:
    x, y = k_fold.spirals(30)
    accuracies = k_fold.cross_validate(k_fold.mlp(8), x, y, 3, epochs=20)
    for m, (train, held_out) in enumerate(zip(*k_fold.folds(30, 3), strict=True)):
        torch.manual_seed(m)
        model = k_fold.mlp(8)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[train]), y[train]).backward()
            optimizer.step()
        right = (model(x[held_out]).argmax(1) == y[held_out]).float().mean()
        assert accuracies[m] == right
