"""The page that a run ends with: every figure of its log as a curve, its samples, its recipe. One HTML file."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

PAGE_FILE = "report.html"
_WIDTH, _HEIGHT, _POINTS = 320, 120, 200
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:72em}figure{display:inline-block;margin:0 1em 1em 0}"
    "img{max-width:100%}"
)


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of ``log.jsonl`` by stage, in the order of their steps. A resumed step counts once, the last time; lines
    that are no rows, as a run that was killed may leave one, are left out."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            latest[str(row["stage"]), int(row["step"])] = row
        except (ValueError, TypeError, KeyError):
            continue
    stages: dict[str, list[dict[str, Any]]] = {stage: [] for stage, _ in latest}
    for stage, step in sorted(latest, key=lambda key: key[1]):
        stages[stage].append(latest[stage, step])
    return stages


def curve(steps: list[int], values: list[float]) -> str:
    """An SVG line of means over at most 200 parts of the steps."""
    width = max(1, -(-len(values) // _POINTS))
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    means = [sum(p) / len(p) for p in parts]
    at = [steps[min(i * width + width, len(steps)) - 1] for i in range(len(parts))]
    low, high, first, last = min(means), max(means), at[0], at[-1]
    points = " ".join(
        f"{_WIDTH * (x - first) / max(1, last - first):.1f},{_HEIGHT * (1 - (y - low) / (high - low or 1)):.1f}"
        for x, y in zip(at, means, strict=True)
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}">'
        f'<polyline fill="none" stroke="#06c" stroke-width="1.5" points="{points}"/></svg>'
    )


def _figure(name: str, rows: list[dict[str, Any]]) -> str:
    held = [(int(r["step"]), float(r[name])) for r in rows if isinstance(r.get(name), (int, float))]
    held = [(step, value) for step, value in held if math.isfinite(value)]
    if not held:
        return ""
    values = [value for _, value in held]
    text = f"{html.escape(name)}: {values[0]:.4g} to {values[-1]:.4g}, least {min(values):.4g}, most {max(values):.4g}"
    return f"<figure>{curve([s for s, _ in held], values)}<figcaption>{text}</figcaption></figure>"


def write_page(out: Path) -> Path:
    """Write ``report.html`` into the run's folder ``out``, from its log, its samples and its recipe.

    Returns:
        The file's path. It holds its pictures and asks for nothing else.
    """
    stages = read_log(out / "log.jsonl")
    body = [f"<h1>Run {html.escape(out.name)}</h1>"]
    for stage, rows in stages.items():
        names = list(dict.fromkeys(n for r in rows for n in r if n not in ("stage", "step")))
        figures = "".join(_figure(n, rows) for n in names)
        body.append(f"<h2>{html.escape(stage)}, {len(rows):,} steps</h2>{figures}")
        for picture in sorted((out / "samples").glob(f"{stage}-*.png")):
            data = base64.b64encode(picture.read_bytes()).decode()
            name = html.escape(picture.stem)
            body.append(f'<p>{name}<br><img alt="{name}" src="data:image/png;base64,{data}"></p>')
        for said in sorted((out / "samples").glob(f"{stage}-*.txt")):
            body.append(f"<p>{html.escape(said.stem)}</p><pre>{html.escape(said.read_text())}</pre>")
    recipe = out / "recipe.yaml"
    if recipe.is_file():
        body.append(f"<h2>Recipe</h2><pre>{html.escape(recipe.read_text())}</pre>")
    page = out / PAGE_FILE
    title = f"<title>{html.escape(out.name)}</title>"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{_STYLE}</style>{"".join(body)}</html>\n'
    )
    return page
