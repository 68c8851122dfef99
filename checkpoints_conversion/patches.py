"""Every layout as patchwork: a stored matrix is made of rectangles of Hugging Face's tensors.

Fusing, interleaving, splitting, padding and repeating move rectangles and change none of their values. So one
description serves both ways: a matrix is written from its patches, and a tensor is read from the patches that name it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Patch:
    """A rectangle of `rows` x `columns` numbers: at (row, column) of a stored matrix, and at (source_row,
    source_column) of the tensor `source` of the Hugging Face layout."""

    source: str
    source_row: int
    source_column: int
    row: int
    column: int
    rows: int
    columns: int

    @property
    def target(self) -> tuple[slice, slice]:
        """Index of the rectangle in an array of the stored matrix."""
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)

    def window(self, row: int, rows: int, column: int, columns: int) -> "Patch | None":
        """Return the part within `rows` x `columns` numbers at (row, column), which becomes (0, 0), or None."""
        top, bottom = max(self.row, row), min(self.row + self.rows, row + rows)
        left, right = max(self.column, column), min(self.column + self.columns, column + columns)
        if top >= bottom or left >= right:
            return None
        return Patch(
            source=self.source,
            source_row=self.source_row + top - self.row,
            source_column=self.source_column + left - self.column,
            row=top - row,
            column=left - column,
            rows=bottom - top,
            columns=right - left,
        )


@dataclass(frozen=True)
class Matrix:
    """A stored matrix; what no patch covers is 0. A vector is a matrix of one row."""

    rows: int
    columns: int
    patches: tuple[Patch, ...]

    @property
    def is_full(self) -> bool:
        """True when patches, which never overlap, cover all of it."""
        return sum(patch.rows * patch.columns for patch in self.patches) == self.rows * self.columns


def whole(name: str, shape: tuple[int, ...]) -> Matrix:
    """Describe a matrix that is a tensor as it is."""
    rows, columns = matrix_size(shape)
    return Matrix(rows, columns, (Patch(name, 0, 0, 0, 0, rows, columns),))


def matrix_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a tensor's shape; dimensions before the last two must be 1."""
    assert all(size == 1 for size in shape[:-2]), f"{shape} is no matrix"
    return (shape[-2] if len(shape) > 1 else 1), shape[-1]


def row_window(matrix: Matrix, start: int, count: int) -> Matrix:
    """Return `count` rows from `start`; those behind the last row are padding."""
    return _window(matrix, start, count, 0, matrix.columns)


def column_window(matrix: Matrix, start: int, count: int) -> Matrix:
    """Return `count` columns from `start`."""
    return _window(matrix, 0, matrix.rows, start, count)


def row_part(matrix: Matrix, index: int, parts: int) -> Matrix:
    """Return one of `parts` equal parts of the rows, the last ones padded where rows do not divide."""
    count = -(-matrix.rows // parts)
    return row_window(matrix, index * count, count)


def column_part(matrix: Matrix, index: int, parts: int) -> Matrix:
    """Return one of `parts` equal parts of the columns."""
    assert matrix.columns % parts == 0, f"{matrix.columns} columns do not divide by {parts}"
    count = matrix.columns // parts
    return column_window(matrix, index * count, count)


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """Put matrices of the same width one above the other."""
    patches: list[Patch] = []
    height = 0
    for matrix in matrices:
        patches += [replace(patch, row=patch.row + height) for patch in matrix.patches]
        height += matrix.rows
    return Matrix(height, matrices[0].columns, tuple(patches))


def _window(matrix: Matrix, row: int, rows: int, column: int, columns: int) -> Matrix:
    parts = (patch.window(row, rows, column, columns) for patch in matrix.patches)
    return Matrix(rows, columns, tuple(part for part in parts if part is not None))
