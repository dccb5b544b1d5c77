"""The two modes as one HTML page."""

from collections.abc import Iterator, Mapping, Sequence

from petals_eval.report import charts
from petals_eval.report.templating import Plot, template
from petals_eval.two_modes.compare import Modes
from petals_eval.two_modes.terminal import lines_of

__all__ = ["modes_page"]


def modes_page(model: str, shown: Mapping[str, Modes], label_names: Sequence[str] = ()) -> str:
    """Return the page of what `modes` found.

    model: its name. shown: by the adapter's name, or by that of the model. label_names: of the classes, where known.
    """
    rendered: str = template("modes.html").render(
        model=model,
        shown=shown,
        plots={name: list(_plots(found)) for name, found in shown.items()},
        lines={name: list(lines_of(found, label_names)) for name, found in shown.items()},
    )
    return rendered


def _plots(found: Modes) -> Iterator[Plot]:
    for mode, answers in (("training", found.training), ("eval", found.evaluation)):
        values = [(f"answer {number}", each.top_logit, None) for number, each in enumerate(answers, 1)]
        svg = charts.points(values, "top logit", title=f"top logits in {mode} mode")
        yield Plot(f"In {mode} mode", svg, "The highest logit of each answer to the same input.")
    if found.forgotten is not None:
        passes = [(f"pass {number}", each, None) for number, each in enumerate(found.forgotten.in_training, 1)]
        svg = charts.points(
            passes, "accuracy", title="accuracy in training mode", line=found.forgotten.in_eval, line_name="eval mode"
        )
        yield Plot("Had eval() been forgotten", svg, "Accuracy over the same rows, from one pass to the next.")
