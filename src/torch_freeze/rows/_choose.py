"""What a user gives as `rows=`, as row numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .. import _format


@runtime_checkable
class HasVocabulary(Protocol):
    """A tokenizer, as Transformers and Tokenizers have it."""

    def get_vocab(self) -> Mapping[str, int]: ...


#: Rows of one table: a number, a slice, a range, row numbers (a list, an array or an integer tensor
#: of one dimension), a mask (a bool tensor or list, one for each row), or tokens of a vocabulary.
Rows: TypeAlias = (
    int | slice | range | Tensor | str | Iterable[int] | Iterable[bool] | Iterable[str]
)

#: What gives the row of each token: a tokenizer with `get_vocab()`, or a mapping.
Vocabulary: TypeAlias = HasVocabulary | Mapping[str, int]


def choose(rows: Rows, size: int, name: str, vocab: Vocabulary | None, caller: str) -> Tensor:
    """The rows of the table `name` of `size` rows: ascending numbers, int64 of shape (rows,).

    Raises:
        ValueError: there are no such rows, none at all, or a token is not in the vocabulary.
        TypeError: they are given as something else.
    """
    found = _numbers(rows, size, name, vocab, caller)
    if not len(found):
        raise ValueError(f"{caller}: {_shown(rows)} names no row of {name}, which has {size:,}.")
    low, high = int(found.min()), int(found.max())
    if low < -size or high >= size:
        wrong = low if low < -size else high
        raise ValueError(
            f"{caller}: {_shown(rows)} names row {wrong:,} of {name}, which has only rows 0 to "
            f"{size - 1:,}."
        )
    numbers: Tensor = torch.unique(torch.where(found < 0, found + size, found))
    return numbers


def _numbers(rows: Any, size: int, name: str, vocab: Vocabulary | None, caller: str) -> Tensor:
    if isinstance(rows, (bytes, bytearray, Mapping)):
        raise _unknown(rows, caller)
    if isinstance(rows, slice):
        ends = [end for end in (rows.start, rows.stop, rows.step) if end is not None]
        if rows.step == 0 or not all(isinstance(end, SupportsIndex) for end in ends):
            raise TypeError(f"{caller}: {rows} is no slice of row numbers.")
        for end in (rows.start, rows.stop):
            if end is not None and not -size <= end <= size:
                raise ValueError(
                    f"{caller}: {_shown(rows)} goes beyond the {size:,} rows of {name}."
                )
        rows = range(size)[rows]
    elif isinstance(rows, str) or (
        isinstance(rows, SupportsIndex) and not hasattr(rows, "__len__")
    ):
        rows = [rows]
    if isinstance(rows, Iterable) and not hasattr(rows, "__array__"):
        rows = list(rows)
        if any(isinstance(row, str) for row in rows):
            rows = _of_tokens(rows, name, vocab, caller)
        elif len({isinstance(row, bool) for row in rows}) > 1:
            # torch would take a bool among numbers as row 0 or 1.
            raise _unknown(rows, caller)
    try:
        found = torch.as_tensor(rows).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unknown(rows, caller) from error
    if found.dtype is torch.bool:
        if found.shape != (size,):
            raise ValueError(
                f"{caller}: the mask of shape {list(found.shape)} does not fit {name}, which has "
                f"{size:,} rows; it must have the shape [{size}]."
            )
        return found.nonzero().flatten()
    if found.dtype is torch.uint8 and found.numel() == size:
        raise TypeError(
            f"{caller}: {_shown(rows)} may be a mask or row numbers; call bool() or long() on it."
        )
    numbers = not (found.dtype.is_floating_point or found.dtype.is_complex)
    if found.numel() and not (numbers and found.dim() == 1):
        raise _unknown(rows, caller)
    return found.flatten().to(torch.int64)


def _of_tokens(tokens: list[Any], name: str, vocab: Any, caller: str) -> list[int]:
    if vocab is None:
        raise TypeError(
            f"{caller}: rows= has tokens such as {tokens[0]!r}; give the tokenizer too: "
            "vocab=tokenizer (or a mapping from token to row)."
        )
    known = vocab.get_vocab() if isinstance(vocab, HasVocabulary) else vocab
    if not isinstance(known, Mapping):
        raise TypeError(
            f"{caller}: vocab must be a mapping from token to row or have get_vocab(); got "
            f"{type(vocab).__name__}."
        )
    if wrong := [token for token in tokens if not isinstance(token, str) or token not in known]:
        text = str(wrong[0])
        near = difflib.get_close_matches(text, map(str, known), n=3) if len(known) < 10**6 else []
        raise ValueError(
            f"{caller}: {_format.listed(map(repr, wrong))} of rows={_shown(tokens)[5:]} "
            f"{'is' if len(wrong) == 1 else 'are'} not in the vocabulary"
            + (f" (nearest: {', '.join(map(repr, near))})" if near else "")
            + ". Add new tokens to the tokenizer, and their rows to the model, before."
        )
    return [known[token] for token in tokens]


def _unknown(rows: object, caller: str) -> TypeError:
    what = type(rows).__name__
    if isinstance(rows, Tensor):
        what = f"a tensor of shape {list(rows.shape)} and dtype {rows.dtype}"
    return TypeError(
        f"{caller}: cannot take {what} as rows; give a slice, a range, row numbers (a list or an "
        "integer tensor of one dimension), a bool mask with one entry for each row, or tokens "
        "together with vocab=tokenizer."
    )


def _shown(rows: object) -> str:
    if isinstance(rows, Tensor):
        return f"the tensor of {rows.numel():,} rows"
    text = repr(rows)
    return f"rows={text if len(text) <= 60 else text[:57] + '...'}"
