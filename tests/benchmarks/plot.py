"""Bars as an SVG, written by hand."""

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "number"]

_COLOURS = ("#00796b", "#6fb7ae", "#9e9e9e", "#616161")
_WIDTH, _LABELS, _VALUES = 720, 190, 90
_ROW, _GAP, _HEAD = 22, 34, 74


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bars(title: str, series: Sequence[str], groups: Mapping[str, Sequence[float]]) -> str:
    """A group of bars for each entry, on a scale of its own: one bar for each of the series."""
    height = _HEAD + len(groups) * (len(series) * _ROW + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(20, 28, title, size=16, weight=600),
        _text(20, 48, "Shorter is better; each group has its own scale.", colour="#666666"),
    ]
    top = _HEAD
    for group, values in groups.items():
        parts.append(_text(20, top + 4, group, weight=600))
        top += 14
        longest = max(values) or 1
        for name, value, colour in zip(series, values, _COLOURS, strict=False):
            length = max(1.0, value / longest * (_WIDTH - _LABELS - _VALUES - 20))
            parts.append(_text(_LABELS - 8, top + 13, name, anchor="end"))
            parts.append(f'<rect x="{_LABELS}" y="{top + 1}" width="{length:.1f}" height="16" rx="2" fill="{colour}"/>')
            parts.append(_text(_LABELS + length + 8, top + 13, number(value)))
            top += _ROW
        top += _GAP - 14
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, *, size: int = 13, weight: int = 400, anchor: str = "start",
          colour: str = "#222222") -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(words)}</text>'
    )
