# SPDX-License-Identifier: Apache-2.0
"""An einsum equation of two operands as a batched matrix product: which dims play which part.

Pure: strings, shapes and strides in, orders of dims out. Imports neither torch nor TE.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import prod
from typing import NamedTuple, Optional, Sequence

# A letter, or the place of a dim that an ellipsis stands for, counted from the right.
Index = str | int


class Equation(NamedTuple):
    """The indices of an equation, each in exactly one of four parts.

    Parameters
    ----------
    a, b, output : tuple of Index
        Indices of the dims, in order.
    batch : tuple of Index
        In both operands and in the output.
    rows, cols : tuple of Index
        In `a` (`b`) and the output.
    contracted : tuple of Index
        In both operands only: summed over.
    """

    a: tuple[Index, ...]
    b: tuple[Index, ...]
    output: tuple[Index, ...]
    batch: tuple[Index, ...]
    rows: tuple[Index, ...]
    cols: tuple[Index, ...]
    contracted: tuple[Index, ...]


class Contraction(NamedTuple):
    """An equation for operands of given shapes.

    Parameters
    ----------
    a_dims, b_dims : tuple of int
        Permutations of the operands to ``[*batch, *rows, *contracted]`` and ``[*batch, *contracted, *cols]``.
    a_shape, b_shape : tuple of int
        Shapes after that, contracted dims expanded where one operand repeats them.
    a_matrix, b_matrix : tuple of int
        The same with rows, columns and contracted dims merged into one each.
    product_shape : tuple of int
        Shape of the product with its dims apart, ``[*batch, *rows, *cols]``.
    product_strides : tuple of int, optional
        Strides of the product with merged dims that make the output contiguous; None if no such are, or if
        the product is contiguous then.
    output_dims : tuple of int
        Permutation of the product with its dims apart to the output.
    output_shape : tuple of int
    """

    a_dims: tuple[int, ...]
    b_dims: tuple[int, ...]
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a_matrix: tuple[int, ...]
    b_matrix: tuple[int, ...]
    product_shape: tuple[int, ...]
    product_strides: Optional[tuple[int, ...]]
    output_dims: tuple[int, ...]
    output_shape: tuple[int, ...]


def check_equation(equation: str) -> None:
    """Refuses what is wrong whatever the operands' shapes.

    Raises
    ------
    TypeError, ValueError
        As `parse_equation`.
    """
    if not isinstance(equation, str):
        raise TypeError(f"equation: expected a str, got {type(equation).__name__}")
    a, b, _ = _split(equation)
    # As many dims as there are letters, and one for each ellipsis.
    parse_equation(equation, *(len(x.replace("...", "_")) for x in (a, b)))


@lru_cache(maxsize=4096)
def parse_equation(equation: str, a_ndim: int, b_ndim: int) -> Equation:
    """The indices of an equation in torch.einsum's notation.

    Letters of both cases, spaces anywhere, an ellipsis in any part. Without ``->`` the output has the dims of
    the ellipsis and then, in the order of the alphabet (capitals first), the letters that occur once.

    Parameters
    ----------
    equation : str
        For two operands: ``"bikd,bjkd->bijd"``.
    a_ndim, b_ndim : int
        Dims of the operands.

    Returns
    -------
    Equation

    Raises
    ------
    ValueError
        If the equation is malformed, is not of two operands, repeats an index in one operand or in the
        output, sums over an index of one operand alone, has an output index that no operand has, or does not fit
        the operands. The message names the index.

    Examples
    --------
    >>> parse_equation("bikd, bjkd -> bijd", 4, 4)[3:]
    (('b', 'd'), ('i',), ('j',), ('k',))
    """
    a_text, b_text, output_text = _split(equation)
    a = _read_operand(equation, "a", a_text, a_ndim)
    b = _read_operand(equation, "b", b_text, b_ndim)
    ellipsis = tuple(sorted({x for x in (*a, *b) if isinstance(x, int)}, reverse=True))
    if output_text is None:
        counts = Counter(x for x in (*a, *b) if isinstance(x, str))
        output = (*ellipsis, *sorted(x for x, count in counts.items() if count == 1))
    else:
        output = _read(output_text, ellipsis)
    for index, count in Counter(output).items():
        if count > 1:
            raise ValueError(
                f"equation {equation!r}: index {index!r} occurs {count} times in the output; torch.einsum has "
                "no such output, either"
            )
        if index not in a and index not in b:
            raise ValueError(
                f"equation {equation!r}: index {index!r} of the output is in no operand"
            )
    for name, mine, other in (("a", a, b), ("b", b, a)):
        for index in mine:
            if index not in other and index not in output:
                shown = "of the ellipsis" if isinstance(index, int) else repr(index)
                raise ValueError(
                    f"equation {equation!r}: index {shown} of operand {name} is summed over alone, which is no part "
                    f"of a batched product; sum over it first: {name}.sum(dim)"
                )
    both = set(a) & set(b)
    return Equation(
        a=a,
        b=b,
        output=output,
        batch=tuple(x for x in output if x in both),
        rows=tuple(x for x in a if x not in both),
        cols=tuple(x for x in b if x not in both),
        contracted=tuple(x for x in a if x in both and x not in output),
    )


def _split(equation: str) -> tuple[str, str, Optional[str]]:
    """Texts of both operands and of the output, None if there is none."""
    text = "".join(equation.split())
    inputs, arrow, output = text.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        raise ValueError(
            f"equation {equation!r} has {len(parts)} operand{'s' if len(parts) > 1 else ''}: expected two, as in "
            '"bikd,bjkd->bijd". Contract more of them pair by pair.'
        )
    for part in (*parts, output):
        letters = part.replace("...", "", 1)
        for character in letters:
            if not ("a" <= character <= "z" or "A" <= character <= "Z"):
                raise ValueError(
                    f"equation {equation!r}: {character!r} is no index; expected letters, one ellipsis '...' for each "
                    "operand and for the output, one comma and at most one '->'"
                )
    return parts[0], parts[1], output if arrow else None


def _read(text: str, ellipsis: tuple[int, ...]) -> tuple[Index, ...]:
    before, dots, after = text.partition("...")
    return (*before, *(ellipsis if dots else ()), *after)


def _read_operand(equation: str, name: str, text: str, ndim: int) -> tuple[Index, ...]:
    num_letters = len(text.replace("...", ""))
    num_more = ndim - num_letters
    if num_more < 0 or num_more > 0 and "..." not in text:
        raise ValueError(
            f"equation {equation!r}: operand {name} has {ndim} dims and {text!r} names {num_letters}"
            + (" besides the ellipsis" if "..." in text else "")
        )
    indices = _read(text, tuple(reversed(range(num_more))))
    for index, count in Counter(indices).items():
        if count > 1:
            raise ValueError(
                f"equation {equation!r}: index {index!r} occurs {count} times in operand {name}, which asks for a "
                f"diagonal; take it first: {name}.diagonal(dim1=..., dim2=...)"
            )
    return indices


@lru_cache(maxsize=4096)
def plan_contraction(
    equation: str,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    a_strides: Optional[tuple[int, ...]] = None,
    b_strides: Optional[tuple[int, ...]] = None,
) -> Contraction:
    """How operands of given shapes are permuted for the product, and the product for the output.

    Dims of size 1 broadcast, as in torch.einsum. Several indices of one part are merged, in the order in which
    they lie in memory if strides are given.

    Raises
    ------
    ValueError
        As `parse_equation`, and if an index has two sizes.

    Examples
    --------
    >>> plan = plan_contraction("bikd,bjkd->bijd", (2, 5, 7, 3), (2, 6, 7, 3))
    >>> plan.a_dims, plan.b_dims, plan.output_dims
    ((0, 3, 1, 2), (0, 3, 2, 1), (0, 2, 3, 1))
    """
    parsed = parse_equation(equation, len(a_shape), len(b_shape))
    sizes: dict[Index, int] = {}
    for index, size in (*zip(parsed.a, a_shape), *zip(parsed.b, b_shape)):
        known = sizes.setdefault(index, size)
        if known != size and 1 not in (known, size):
            where = [list(shape) for shape in (a_shape, b_shape)]
            raise ValueError(
                f"equation {equation!r}: index {index!r} has size {known} in operand a {where[0]} and {size} in "
                f"operand b {where[1]}"
            )
        if known == 1:
            sizes[index] = size
    rows = _by_stride(parsed.rows, parsed.a, a_strides)
    cols = _by_stride(parsed.cols, parsed.b, b_strides)
    contracted = _by_stride(parsed.contracted, parsed.a, a_strides)
    own_a, own_b = dict(zip(parsed.a, a_shape)), dict(zip(parsed.b, b_shape))
    batch_a, batch_b = ([own[x] for x in parsed.batch] for own in (own_a, own_b))
    inner, outer_a, outer_b = ([sizes[x] for x in part] for part in (contracted, rows, cols))
    product = (*parsed.batch, *rows, *cols)
    steps, step = {}, 1
    for index in reversed(parsed.output):
        steps[index] = step
        step *= max(sizes[index], 1)
    merged = [_merge([(sizes[x], steps[x]) for x in part]) for part in (rows, cols)]
    is_contiguous = product == parsed.output
    has_strides = not is_contiguous and None not in merged
    return Contraction(
        a_dims=_places((*parsed.batch, *rows, *contracted), parsed.a),
        b_dims=_places((*parsed.batch, *contracted, *cols), parsed.b),
        a_shape=(*batch_a, *outer_a, *inner),
        b_shape=(*batch_b, *inner, *outer_b),
        a_matrix=(*batch_a, prod(outer_a), prod(inner)),
        b_matrix=(*batch_b, prod(inner), prod(outer_b)),
        product_shape=tuple(sizes[x] for x in product),
        product_strides=(*(steps[x] for x in parsed.batch), *merged) if has_strides else None,
        output_dims=_places(parsed.output, product),
        output_shape=tuple(sizes[x] for x in parsed.output),
    )


def _places(wanted: Sequence[Index], among: Sequence[Index]) -> tuple[int, ...]:
    return tuple(among.index(index) for index in wanted)


def _by_stride(
    part: tuple[Index, ...], operand: tuple[Index, ...], strides: Optional[tuple[int, ...]]
) -> tuple[Index, ...]:
    """Indices from the outermost to the innermost dim in memory, where dims can merge."""
    if strides is None or len(part) < 2:
        return part
    return tuple(sorted(part, key=lambda index: -strides[operand.index(index)]))


def _merge(dims: Sequence[tuple[int, int]]) -> Optional[int]:
    """Stride of dims of these (size, stride) merged into one; None if they are not one."""
    dims = [dim for dim in dims if dim[0] != 1]
    for (_, outer), (size, inner) in zip(dims[:-1], dims[1:]):
        if outer != size * inner:
            return None
    return dims[-1][1] if dims else 1
