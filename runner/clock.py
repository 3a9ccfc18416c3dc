"""Durations as people read them."""


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    whole = int(seconds + 0.5)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
