"""Times that an operator writes."""

from datetime import UTC, datetime


def in_utc(time: datetime) -> datetime:
    """The same time, which knows its zone. Raises ValueError where UTC has none such."""
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time in UTC, whose years are 1 to 9999") from None
