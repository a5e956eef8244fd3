"""Times that an operator writes."""

from datetime import UTC, datetime


def in_utc(time: datetime) -> datetime:
    """The same time. Raises ValueError where it has no zone, or UTC has none such."""
    if time.tzinfo is None:
        raise ValueError(f"has no time zone; write {time.isoformat()}Z if UTC is meant")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time in UTC, whose years are 1 to 9999") from None
