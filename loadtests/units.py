"""Figures as people read them."""


def short_count(value: float) -> str:
    """512, 8K, 60K: powers of two where they come out even, thousands elsewhere."""
    if value < 1000:
        return f"{value:.0f}"
    if value % 1024 == 0:
        return f"{value / 1024:.0f}K"
    return f"{value / 1024:.1f}K"


def short_length(tokens: int) -> str:
    """A prompt length: 8K where that is exact, else every digit, 16,352."""
    return short_count(tokens) if tokens % 1024 == 0 else f"{tokens:,}"


def short_number(value: float) -> str:
    """Three digits below a thousand, whole numbers from there on."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def short_ms(value: float) -> str:
    """Milliseconds below one second, seconds above, three digits."""
    return f"{value:.3g} ms" if value < 999.5 else f"{short_number(value / 1000)} s"


def short_bytes(value: float) -> str:
    """Binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{short_number(value)} TiB"


def parse_bytes(text: str) -> int:
    """80GiB, 24 GB or a plain number of bytes; raises ValueError for anything else."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
             "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise ValueError(f"not a size in bytes: '{text}'; write it as 80GiB") from None
