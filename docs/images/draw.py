"""Draws pipeline.svg and mapping.svg beside this file: ``python docs/images/draw.py``."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdnas.models.layers import Last, LastAndSkip, LayerMapping, Skip

# Readable on white and on black.
BLUE, ORANGE, GREEN, GREY, LINE = "#2470b8", "#b35c1e", "#2a7d54", "#5f666e", "#868c94"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "kdnas", "text.parse_math": False, "font.size": 9}
NUM_STUDENT, NUM_TEACHER = 3, 6


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.6) -> None:
    """A box around white text, with its middle at (x, y)."""
    axes.text(x, y, text, color="white", ha="center", va="center", zorder=3)
    corner = (x - width / 2, y - 0.28)
    style = "round,pad=0,rounding_size=0.08"
    patch = matplotlib.patches.FancyBboxPatch(corner, width, 0.56, style, fc=colour, lw=0)
    axes.add_patch(patch)


def arrow(axes: Axes, *points: tuple[float, float], colour: str = LINE) -> None:
    """A line through the points, with a head at the last."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=colour, lw=1.3, zorder=1)
    looks = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=looks)


def chain(axes: Axes, y: float, *steps: tuple[float, str, str]) -> None:
    """Boxes from left to right, and an arrow from each to the next."""
    for x, text, colour in steps:
        box(axes, x, y, text, colour)
    for (left, *_), (right, *_) in zip(steps, steps[1:], strict=False):
        arrow(axes, (left + 0.8, y), (right - 0.8, y))


def caption(axes: Axes, x: float, y: float, text: str, ha: str = "left") -> None:
    """Text outside a box."""
    axes.text(x, y, text, color=LINE, ha=ha, va="center")


def draw_pipeline(axes: Axes) -> None:
    """From text to report: how a student learns, how shapes are searched, what follows."""
    caption(axes, -0.8, 4.85, "Distillation: how a student of any shape learns")
    chain(axes, 4.0, (0, "text", BLUE), (2.1, "masked batches", BLUE))
    box(axes, 4.2, 4.4, "teacher, run once:\nstored states", BLUE, 1.9)
    box(axes, 4.2, 3.6, "student:\nits own states", BLUE, 1.9)
    chain(axes, 4.0, (6.4, "objective", BLUE), (8.5, "loss", BLUE))
    for y in (4.4, 3.6):
        arrow(axes, (2.9, 4.0), (3.25, y))
        arrow(axes, (5.15, y), (5.6, 4.0))

    caption(axes, -0.8, 2.85, "Search: which shape is worth most")
    proposed = [(0, "space, from the\nteacher's config", ORANGE), (2.1, "sampler", ORANGE)]
    proposed += [(4.2, "shape", ORANGE), (6.3, "distillation on\n30 % of the rows", BLUE)]
    chain(axes, 2.3, *proposed, (8.5, "reward, from\nloss and latency", ORANGE))
    arrow(axes, (8.5, 2.02), (8.5, 1.72), (2.1, 1.72), (2.1, 2.02))

    caption(axes, -0.8, 1.15, "The best shape")
    best = [(0, "distillation on\nall rows", BLUE), (2.1, "fine-tuning beside\nthe teacher", GREEN)]
    chain(axes, 0.6, *best, (4.2, "export", GREEN), (6.3, "report", GREEN))
    axes.set(xlim=(-0.85, 9.35), ylim=(0.25, 5.05))


def draw_mapping(
    axes: Axes, x: float, mapping: LayerMapping, title: str, rule: str, *colours: str
) -> None:
    """Student layers at x, and the teacher layers that each learns from, in these colours."""
    is_both = len(colours) == 2
    teacher_x = x + (3.0 if is_both else 1.8)
    caption(axes, (x + teacher_x) / 2, 4.75, title, "center")
    caption(axes, (x + teacher_x) / 2, -0.7, rule, "center")
    for j in range(NUM_TEACHER):
        box(axes, teacher_x, 0.8 * j, f"teacher {j}", GREY, 0.9)
    for i, layers in enumerate(mapping(NUM_STUDENT, NUM_TEACHER)):
        y = 0.8 * (i + 1.5)
        box(axes, x, y, f"student {i}", GREEN, 0.9)
        start = x + 0.45
        if is_both:
            arrow(axes, (start, y), (x + 0.85, y))
            box(axes, x + 1.0, y, "W", GREY, 0.3)
            start = x + 1.15
        for layer, colour in zip(layers, colours, strict=True):
            arrow(axes, (start, y), (teacher_x - 0.45, 0.8 * layer), colour=colour)


def draw_mappings(axes: Axes) -> None:
    """The last and the skip mapping, and both together as in the original."""
    draw_mapping(axes, 0.0, Last(), "last", "teacher layer  L_t - L_s + i", ORANGE)
    draw_mapping(axes, 3.2, Skip(), "skip", "teacher layer  i * floor(L_t / L_s)", BLUE)
    rule = "W: H_s → 2 H_t, one for all student layers"
    draw_mapping(axes, 6.4, LastAndSkip(), "last and skip: the original", rule, ORANGE, BLUE)
    axes.set(xlim=(-0.5, 9.9), ylim=(-0.9, 4.95))


def main() -> None:
    """Write both pictures, the same bytes each time."""
    matplotlib.rcParams.update(STYLE)
    drawings = {"pipeline": (draw_pipeline, 4.2), "mapping": (draw_mappings, 4.2)}
    for name, (draw, height) in drawings.items():
        figure = Figure(figsize=(8.6, height), layout="tight")
        axes = figure.add_subplot()
        axes.axis("off")
        draw(axes)
        path = Path(__file__).with_name(f"{name}.svg")
        figure.savefig(path, transparent=True, metadata={"Creator": None, "Date": None})


if __name__ == "__main__":
    main()
