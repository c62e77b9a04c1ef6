"""Writes the README's table of scores from those of the shipped checkpoint, between two marks.

synergen eval --json synergen_ext/checkpoints/demo/scores.json
python tools/write_scores.py
"""

import json
import re
from pathlib import Path

from synergen_ext.cli.measure import figure_rows

ROOT = Path(__file__).resolve().parents[1]
SCORES = ROOT / "synergen_ext" / "checkpoints" / "demo" / "scores.json"
README = ROOT / "README.md"
BETWEEN = re.compile(r"(<!-- scores:[^\n]*-->\n).*?(<!-- /scores -->)", re.DOTALL)

EXAMS = {
    "generation": "painting",
    "understanding": "answering",
    "tokenizer": "image tokenizer",
}
FIGURES = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colour",
    "color": "colour",
    "position": "position",
    "color_attr": "colours of two objects",
    "overall": "mean of the six",
    "any_correct": "prompts with a right picture among theirs",
    "exact": "nothing but what was asked",
    "naming": "names of the objects",
    "naming_counts": "names and counts",
    "caption": "caption names every object",
    "caption_exact": "caption right in every word that matters",
    "box_psnr": "PSNR inside the objects' boxes, dB",
    "box_psnr_low": "the same, lowest tenth's bound, dB",
    "psnr": "PSNR of whole pictures, dB",
    "codes_used": "share of the codebook in use",
    "steady_ids": "objects' tokens with their usual id",
    "read_true": "true scenes read without a fault",
    "read_reconstructed": "reconstructions read without a fault",
}


def table(scores: dict) -> str:
    lines = ["| exam | figure | score | 95 % interval |", "|---|---|---|---|"]
    for exam, name, value, interval in figure_rows(scores):
        shown = f"{value:.1f}" if name.endswith("psnr") or "psnr_" in name else f"{value:.3f}"
        bounds = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        lines.append(f"| {EXAMS.get(exam, exam)} | {FIGURES.get(name, name)} | {shown} | {bounds} |")
    return "\n".join(lines) + "\n"


def readme_with(readme: str, scores: dict) -> str:
    """The README's text with the table of ``scores`` between its marks."""
    settings = scores.get("generation", {}).get("settings", {})
    note = ""
    if settings:
        note = (
            f"\n{scores['generation']['prompts']} held-out prompts, {settings['images_per_prompt']} pictures each, "
            f"guidance {settings['guidance']:g}, judged by GenEval's rules; the questions are about held-out scenes. "
            "`synergen eval` repeats it.\n"
        )
    return BETWEEN.sub(lambda marks: marks[1] + table(scores) + note + marks[2], readme)


if __name__ == "__main__":
    README.write_text(readme_with(README.read_text(), json.loads(SCORES.read_text())))
