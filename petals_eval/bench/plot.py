"""Lines in an SVG picture, without a library for it: what a benchmark found, to look at."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle, groupby

__all__ = ["busy_plot", "line_plot"]

Points = Sequence[tuple[float, float]]

_COLOURS = ("#1f6fb4", "#d1601f", "#2e8b57", "#8a4fae", "#b02a3a", "#6b6b6b")
_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 40, 520, 300


def line_plot(title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """Return an SVG picture of some lines over one x axis; both axes begin at 0.

    lines: points (x, y) in order, by the name that the legend shows; at least one point in all.

    >>> line_plot("time", "rows", "seconds", {"ours": [(1, 2), (2, 4)]}).startswith("<svg")
    True
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("expected at least one point")
    x_step, y_step = _step(max(x for x, _ in points)), _step(max(y for _, y in points))
    x_end = x_step * math.ceil(max(x for x, _ in points) / x_step - 1e-9)
    y_end = y_step * math.ceil(max(y for _, y in points) / y_step - 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * x / x_end, _TOP + _HEIGHT * (1 - y / y_end)

    parts = [_text(_LEFT + _WIDTH / 2, 22, title, size=15)]
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 40, x_label))
    parts.append(_text(18, _TOP + _HEIGHT / 2, y_label, turned=True))
    for tick in _ticks(x_step, x_end):
        x, _ = place(tick, 0)
        parts.append(_line(x, _TOP, x, _TOP + _HEIGHT))
        parts.append(_text(x, _TOP + _HEIGHT + 18, f"{tick:g}"))
    for tick in _ticks(y_step, y_end):
        _, y = place(0, tick)
        parts.append(_line(_LEFT, y, _LEFT + _WIDTH, y))
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    for row, ((name, line), colour) in enumerate(zip(lines.items(), cycle(_COLOURS), strict=False)):
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = _TOP + 12 + 18 * row
        parts.append(f'<rect x="{_LEFT + _WIDTH + 16}" y="{y - 9}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(_LEFT + _WIDTH + 34, y + 2, name, anchor="start"))
    return _picture(parts, _LEFT + _WIDTH + 230, _TOP + _HEIGHT + 60)


def busy_plot(title: str, at: Sequence[float], busy: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG picture of how busy some things were over time: a line of cells each, the darker the busier.

    at: seconds, in order, between which the shares lie. busy: shares (len(at) - 1,) from 0 to 1, by name.

    >>> busy_plot("swarm", [0, 1, 2], {"link": [0.5, 1.0]}).count("<rect")
    2
    """
    left, height = 210, 13
    end = max(at[-1], 1e-9)
    bottom = _TOP + height * len(busy)
    parts = [_text(left + _WIDTH / 2, 22, title, size=15)]
    for tick in _ticks(step := _step(end), step * math.floor(end / step)):
        x = left + _WIDTH * tick / end
        parts += [_line(x, _TOP, x, bottom), _text(x, bottom + 18, f"{tick:g}")]
    parts.append(_text(left + _WIDTH / 2, bottom + 40, "seconds"))
    for row, (name, shares) in enumerate(busy.items()):
        y = _TOP + height * row
        parts.append(_text(left - 8, y + 10, name, anchor="end", size=10))
        start = 0
        for shade, cells in groupby(round(10 * share) for share in shares):
            stop = start + len(list(cells))
            if shade:
                x, to_x = (left + _WIDTH * at[edge] / end for edge in (start, stop))
                place = f'x="{x:.1f}" y="{y}" width="{to_x - x:.1f}" height="{height - 1}"'
                parts.append(f'<rect {place} fill="{_COLOURS[0]}" fill-opacity="{shade / 10:g}"/>')
            start = stop
    return _picture(parts, left + _WIDTH + 40, bottom + 60)


def _picture(parts: Sequence[str], width: float, height: float) -> str:
    size = f'width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12" style="background:white"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _step(greatest: float) -> float:
    """Return a round distance between ticks: about five up to `greatest`."""
    if greatest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(greatest / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= greatest * 0.999)


def _ticks(step: float, end: float) -> list[float]:
    return [step * index for index in range(round(end / step) + 1)]


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turn}>{escape(text)}</text>'
