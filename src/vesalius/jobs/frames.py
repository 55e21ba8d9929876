"""Tables for pandas, which is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vesalius.errors import InputError

if TYPE_CHECKING:
    import pandas


def data_frame(rows: Any) -> pandas.DataFrame:
    """Rows, or columns by name, as a DataFrame. Raises InputError where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise InputError("to_frame() needs pandas: pip install pandas") from error
    return pandas.DataFrame(rows)
