"""Failed writes of models and tokenizers, told alike whichever library failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


@contextmanager
def write_errors() -> Iterator[None]:
    """Makes an ``OSError`` of what libraries raise that could not write a file.

    On a full disk safetensors raises an error of its own, torch a ``RuntimeError``, and tokenizers
    a bare ``Exception``.

    Raises:
        OSError: something in the block could not be written.

    Example:
        >>> with write_errors():
        ...     tokenizer.save_pretrained(folder)
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error)) from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error
