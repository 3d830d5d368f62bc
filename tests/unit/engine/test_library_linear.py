"""Layers through the GPU's own library: taken where a trial finds that rows keep their bits, else left alone.

A product that adds up row by row stands in for the library, and one that does so only for many rows.
"""

import pytest
import torch
from torch import Tensor

from engine.model import library_linear
from engine.model.library_linear import LibraryLinear, LibraryTrials, padded_rows, row_counts


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Whatever the number of rows, the same bits."""
    output = (x[:, None, :] * weight).sum(-1)
    return output if bias is None else output + bias


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the rows that are multiplied, in order; no more than 192 at once."""
    seen: list[tuple[int, ...]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return by_rows(x, weight, bias)

    monkeypatch.setattr(library_linear, "_MOST_ROWS", 192)
    monkeypatch.setattr(library_linear, "_product", product)
    return seen


@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_are_computed_in_numbers_that_were_tried(shapes: list[tuple[int, ...]], has_bias: bool) -> None:
    weight, x = torch.randn(7, 5), torch.randn(2, 101, 5)
    bias = torch.randn(7) if has_bias else None
    layer = LibraryTrials().layer(weight, bias)
    assert layer is not None
    tried = {rows for rows, _ in shapes}
    assert tried == {64, 128, 192}
    shapes.clear()
    output = layer(x)
    assert output.shape == (2, 101, 7) and {rows for rows, _ in shapes} <= tried
    torch.testing.assert_close(output, torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(layer(x[:1, :1]), output[:1, :1]), "a row is the same alone"
    assert layer(x[:, :0]).shape == (2, 0, 7)


def test_a_layer_whose_rows_depend_on_their_number_is_not_taken_and_each_shape_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]]
) -> None:
    trials = LibraryTrials()
    assert trials.layer(torch.randn(7, 5), None) is not None
    count = len(shapes)
    assert trials.layer(torch.randn(7, 5), None) is not None and len(shapes) == count

    def split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) > 64:
            return by_rows(x, weight, bias)
        return by_rows(x[:, :3], weight[:, :3], None) + by_rows(x[:, 3:], weight[:, 3:], bias)

    monkeypatch.setattr(library_linear, "_product", split)
    assert trials.layer(torch.randn(9, 5), None) is None
    assert trials.layer(torch.randn(7, 5), None) is not None, "as was found before"


def test_a_layer_that_the_library_refuses_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]]
) -> None:
    def refuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise RuntimeError("split-K cannot be forbidden to this library")

    monkeypatch.setattr(library_linear, "_product", refuse)
    assert LibraryTrials().layer(torch.randn(7, 5), None) is None


def test_numbers_of_rows_are_few_and_bounded_by_the_memory_of_outputs() -> None:
    assert [padded_rows(n) for n in (0, 1, 64, 65, 513, 2048, 2049, 8192)] == [0, 64, 64, 128, 640, 2048, 2560, 8192]
    assert row_counts(4096)[-1] == 8192 and len(row_counts(4096)) == 32
    assert row_counts(151_936)[-1] == 1664 and row_counts(1 << 30) == [64]


def test_row_counts_hold_what_the_shapes_of_graphs_are_padded_to() -> None:
    assert isinstance(LibraryLinear(torch.zeros(3, 2), None), torch.nn.Module)
    assert all(padded_rows(rows) == rows for rows in range(128, 2049, 128)), "a mixed step's tokens"
