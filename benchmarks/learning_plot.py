"""The picture of benchmarks/learning.py: an SVG by hand, so that the same numbers are the same file."""

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]
COLORS = ("#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#d9822b", "#17869c", "#8c6d31", "#c44e8a")
WIDTH, HEIGHT = 250, 170  # of a panel's axes
LEFT, TOP, GAP_X, GAP_Y = 62, 66, 52, 66
COLUMNS, LAST = 3, 4
STYLE = ".h{font-weight:bold;font-size:13px}.t{font-size:15px;font-weight:bold}.n{fill:#555}"


def picture(runs: Sequence[Run]) -> str:
    """A panel for each preset, its mean and spread over the seeds, the others' means behind; then the ends."""
    presets: dict[str, list[Run]] = {}
    for run in runs:
        presets.setdefault(run["preset"], []).append(run)
    rows = len(presets) // COLUMNS + 1
    width = LEFT + COLUMNS * (WIDTH + GAP_X)
    height = TOP + rows * (HEIGHT + GAP_Y)
    low = 20 * int(5 * min(min(run["reward"]) for run in runs))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><style>{STYLE}</style>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(LEFT, 24, "Right answers among the 128 completions of each step", "t", "start"),
        text(
            LEFT, 42, "mean over the seeds, the band one deviation to each side; grey: the others' means", "n", "start"
        ),
    ]
    for number, name in enumerate(presets):
        parts += panel(number, name, presets, low)
    parts += ends(len(presets), presets)
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(number: int, name: str, presets: dict[str, list[Run]], low: int) -> list[str]:
    """The learning curve of a preset."""
    left, top = corner(number)
    steps, color = len(presets[name][0]["reward"]), COLORS[number % len(COLORS)]

    def at(step: int, share: float) -> str:
        return f"{left + WIDTH * (step - 1) / max(steps - 1, 1):.1f},{y_of(top, share, low):.1f}"

    parts = frame(left, top, low, f"{name}, {len(presets[name])} seeds")
    for step in sorted({1, *range(4, steps + 1, 4)}):
        x = left + WIDTH * (step - 1) / max(steps - 1, 1)
        parts += [f'<path d="M{x:.1f} {top + HEIGHT}v4" stroke="#555"/>', text(x, top + HEIGHT + 17, str(step), "n")]
    parts.append(text(left + WIDTH / 2, top + HEIGHT + 34, "step", "n"))
    for other in presets:
        if other != name:
            line = " ".join(at(step, mean) for step, mean, _ in curve(presets[other]))
            parts.append(f'<polyline points="{line}" fill="none" stroke="#c8c8c8"/>')
    points = curve(presets[name])
    band = [at(step, min(mean + deviation, 1.0)) for step, mean, deviation in points]
    band += [at(step, mean - deviation) for step, mean, deviation in reversed(points)]
    parts.append(f'<polygon points="{" ".join(band)}" fill="{color}" fill-opacity="0.25"/>')
    line = " ".join(at(step, mean) for step, mean, _ in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    return parts


def ends(number: int, presets: dict[str, list[Run]]) -> list[str]:
    """The last steps: a dot a seed, a bar for mean and deviation."""
    left, top = corner(number)
    shares = {name: [statistics.fmean(run["reward"][-LAST:]) for run in runs] for name, runs in presets.items()}
    low = 5 * int(20 * min(map(min, shares.values())))
    parts = frame(left, top, low, f"the last {LAST} steps", own_scale=True)
    for place, (name, after) in enumerate(shares.items()):
        middle, color = left + WIDTH * (place + 0.5) / len(presets), COLORS[place % len(COLORS)]
        mean, deviation = statistics.fmean(after), statistics.stdev(after) if len(after) > 1 else 0.0
        upper, lower = (y_of(top, min(mean + part, 1.0), low) for part in (deviation, -deviation))
        for seed, share in enumerate(after):
            x = middle - 9 + 3 * (seed - (len(after) - 1) / 2)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y_of(top, share, low):.1f}" r="2.5" fill="{color}" fill-opacity="0.7"/>'
            )
        parts.append(f'<path d="M{middle + 9:.1f} {upper:.1f}V{lower:.1f}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{middle + 9:.1f}" cy="{y_of(top, mean, low):.1f}" r="4" fill="{color}"/>')
        parts.append(text(middle, top + HEIGHT + 17, name, "n"))
    parts.append(text(left + WIDTH / 2, top + HEIGHT + 34, "a dot a seed, then mean and deviation", "n"))
    return parts


def frame(left: float, top: float, low: int, title: str, own_scale: bool = False) -> list[str]:
    """Axes with shares in percent from `low`, and a title. The first panel of a row has the scale of all."""
    parts = [text(left, top - 8, title, "h", "start")]
    between = next(step for step in (5, 10, 20) if (100 - low) <= 5 * step)
    for percent in range(100, low - 1, -between):
        y = y_of(top, percent / 100, low)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#e6e6e6"/>')
        if left == LEFT or own_scale:
            parts.append(text(left - 6, y + 4, f"{percent} %", "n", "end"))
    parts.append(f'<path d="M{left} {top}V{top + HEIGHT}h{WIDTH}" fill="none" stroke="#555"/>')
    if left == LEFT:
        middle = top + HEIGHT / 2
        parts.append(f'<g transform="rotate(-90 14 {middle})">{text(14, middle, "right answers", "n")}</g>')
    return parts


def curve(runs: Sequence[Run]) -> list[tuple[int, float, float]]:
    """Step, mean and deviation over the seeds."""
    by_step = list(zip(*(run["reward"] for run in runs), strict=True))
    deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_step]
    means = map(statistics.fmean, by_step)
    return list(zip(range(1, len(by_step) + 1), means, deviations, strict=True))


def corner(number: int) -> tuple[int, int]:
    """Left and top of a panel's axes."""
    row, column = divmod(number, COLUMNS)
    return LEFT + column * (WIDTH + GAP_X), TOP + 12 + row * (HEIGHT + GAP_Y)


def y_of(top: float, share: float, low: int) -> float:
    return top + HEIGHT * (1.0 - (100 * share - low) / (100 - low))


def text(x: float, y: float, words: str, kind: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{words}</text>'
