"""A picture with controls, and the same picture where no kernel runs.

One output has three forms: the live widget, a PNG film strip of a few settings (GitHub, HTML
export, a notebook that was not run), and a fixed text. The live part is `widgets.Image` and
`observe`. An Output widget, which `interact` uses, would swallow exceptions, and nothing of it
shows without a kernel.
"""
import html
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ipywidgets

from . import GRID_VARIABLE, grids
from .picture import DPI, Draw, bundle, render

_SLIDER = ipywidgets.SelectionSlider


class SliderPlot:
    """Controls above a picture that `draw(ax, **values)` makes; last in its cell, it is shown.

    controls: {name: values}, a control for each name:
        a list of bools            a checkbox
        a list of strings          a drop-down
        any other list             a slider over the list
        (low, high[, step])        a slider over numbers; floats need the step
    start: {name: value}, the setting at first; the first value of each control where not given.
    still: settings of the film strip, each completed by `start`.
    alt: what there is to see, in words; it stands for the picture where none can be shown.
    size, axes: as in `picture.render`. Further keywords go to `draw` unchanged.

    Raises ValueError for a setting outside the controls. What `draw` raises for the start or a
    still is raised; raised after a control was moved, it is shown under the picture.
    """

    def __init__(self, draw: Draw, controls: dict[str, Sequence], *, alt: str,
                 start: dict[str, Any] | None = None, still: Sequence[dict[str, Any]] = (),
                 size: tuple[float, float] = (6, 3.6), axes: tuple[int, int] = (1, 1), **data):
        self.draw, self.data, self.size, self.axes, self.alt = draw, data, size, axes, alt
        self.values = {name: _values(name, spec) for name, spec in controls.items()}
        first = {name: values[0] for name, values in self.values.items()}
        start = self._setting(first, start or {})
        self.still = [self._setting(start, s) for s in still] or [start]
        self.controls = {name: _control(name, spec, self.values[name], start[name])
                         for name, spec in controls.items()}

        # What fails now fails in the cell, where run-all and the reader see it.
        first_picture = self.picture(**start)
        self.strip = self.film_strip()
        if os.environ.get(GRID_VARIABLE) == "1":
            pictures = self.draw_grid()
            grids.keep(self.strip, [_described(name, values, start[name])
                                    for name, values in self.values.items()], pictures)

        # No tooltip on the Image: in JupyterLab its view then fails with a JavaScript error.
        self.image = ipywidgets.Image(value=first_picture, format="png",
                                      layout={"width": f"{round(size[0] * DPI)}px",
                                              "max_width": "100%", "object_fit": "contain"})
        self.message = ipywidgets.HTML()
        row = ipywidgets.HBox(list(self.controls.values()),
                              layout={"flex_flow": "row wrap", "grid_gap": "0 24px"})
        self.box = ipywidgets.VBox([row, self.image, self.message])
        for control in self.controls.values():
            control.observe(lambda change: self._redraw(), "value")

    def picture(self, **values: Any) -> bytes:
        """PNG bytes for one value of each control; raises what `draw` raises."""
        return render(self.draw, [values | self.data], size=self.size, axes=self.axes)

    def film_strip(self) -> bytes:
        """PNG bytes of the still settings, each under what tells it from the others."""
        shown = [n for n in self.values if len({repr(s[n]) for s in self.still}) > 1]
        titles = [", ".join(f"{_words(n)} = {_label(s[n])}" for n in shown or self.values)
                  for s in self.still]
        return render(self.draw, [s | self.data for s in self.still], size=self.size,
                      axes=self.axes, titles=titles)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the controls' values."""
        for combination in itertools.product(*self.values.values()):
            yield dict(zip(self.values, combination))

    def draw_grid(self) -> list[bytes]:
        """The PNG of every combination, in `grid`'s order; ValueError if a control never changes
        the picture."""
        pictures = {tuple(map(repr, s.values())): self.picture(**s) for s in self.grid()}
        for i, name in enumerate(self.values):
            others = {}
            for setting, png in pictures.items():
                others.setdefault(setting[:i] + setting[i + 1:], set()).add(png)
            if all(len(pngs) == 1 for pngs in others.values()):
                raise ValueError(f"the control '{name}' never changes the picture")
        return list(pictures.values())

    @property
    def error(self) -> str:
        """What is shown under the picture: empty, or the error of the last redraw."""
        return self.message.value

    def _setting(self, base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        for name, value in change.items():
            if name not in self.values or value not in self.values[name]:
                raise ValueError(f"got the setting {name}={value!r}; the controls are "
                                 f"{self.values}")
        return base | change

    def move(self, **setting: Any) -> None:
        """Put controls to other values, as a reader would; the picture follows."""
        for name, value in self._setting({}, setting).items():
            control = self.controls[name]
            control.value = _label(value) if isinstance(control, _SLIDER) else value

    def _redraw(self) -> None:
        values = {name: self.values[name][control.index] if isinstance(control, _SLIDER)
                  else control.value for name, control in self.controls.items()}
        try:
            self.image.value, self.message.value = self.picture(**values), ""
        except Exception as error:  # a callback's exception would be shown nowhere else
            text = html.escape(f"{type(error).__name__}: {error}")
            self.message.value = f"<pre>The picture is that of the setting before. {text}</pre>"

    def _repr_mimebundle_(self, include=None, exclude=None):
        offered = "; ".join(f"{_words(name)}: {', '.join(map(_label, values))}"
                            for name, values in self.values.items())
        data, metadata = bundle(self.strip, f"[controls: {offered}] {self.alt}", self.alt)
        return self.box._repr_mimebundle_() | data, metadata


class LossPlot:
    """A loss curve that grows while a model trains: the callback of `finetune` that draws.

        plot = LossPlot(every=10)       # last in its cell, it is shown
        finetune(model, tokenizer, pairs, config, callback=plot)

    It redraws in the call itself, no thread, every `every` steps and at each dev loss. Where
    nothing can be live, the notebook shows its text: `show(plot.draw, alt=...)` when it is done.
    """

    def __init__(self, every: int = 10, size: tuple[float, float] = (6, 3)):
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 step")
        self.every, self.size = every, size
        self.losses: list[tuple[int, float]] = []
        self.dev: list[tuple[int, float]] = []
        self.image = ipywidgets.Image(value=self.picture(), format="png",
                                      layout={"width": f"{round(size[0] * DPI)}px",
                                              "max_width": "100%", "object_fit": "contain"})

    def __call__(self, metrics: dict) -> None:
        """Take one step's metrics, as the callback of `finetune`."""
        self.losses.append((metrics["step"], metrics["loss"]))
        if "dev_loss" in metrics:
            self.dev.append((metrics["step"], metrics["dev_loss"]))
        if len(self.losses) % self.every == 0 or "dev_loss" in metrics:
            self.image.value = self.picture()

    def picture(self) -> bytes:
        """PNG bytes of the curve so far."""
        return render(self.draw, [{}], size=self.size)

    def draw(self, ax) -> None:
        """The curve so far, as `picture.show` takes it."""
        for points, style, label in ((self.losses, "-", "train"), (self.dev, "o--", "dev")):
            if points:
                ax.plot(*zip(*points), style, label=label)
        ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
        if self.losses:
            ax.legend(loc="upper right")

    def _repr_mimebundle_(self, include=None, exclude=None):
        text = f"a live plot of the loss, redrawn every {self.every} steps"
        return self.image._repr_mimebundle_() | {"text/plain": text}


def _values(name: str, spec: Sequence) -> list:
    """All values of a control; those of (low, high, step) spelt out."""
    if isinstance(spec, tuple):
        step = spec[2] if len(spec) == 3 else 1
        if len(spec) not in (2, 3) or (len(spec) == 2 and float in map(type, spec)) or step <= 0:
            raise ValueError(f"control '{name}': got {spec}; expected (low, high) in whole "
                             "numbers, or (low, high, step) with a step above 0")
        count = int((spec[1] - spec[0]) / step + 1e-9) + 1
        return [spec[0] + i * step if type(spec[0] + step) is int
                else round(spec[0] + i * step, 10) for i in range(count)]
    if not isinstance(spec, list) or len(spec) < 2:
        raise ValueError(f"control '{name}': got {spec!r}; expected a list of two or more values "
                         "or a tuple (low, high[, step])")
    return spec


def _described(name: str, values: list, start: Any) -> dict[str, Any]:
    """A control as a web page makes it: its words, its kind, the words of its values, and the
    place of the first."""
    kind = next((kind for of, kind in ((bool, "box"), (str, "choice"))
                 if all(isinstance(v, of) for v in values)), "slider")
    place = next(i for i, v in enumerate(values) if v == start and type(v) is type(start))
    return {"name": _words(name), "kind": kind, "labels": list(map(_label, values)),
            "start": place}


def _control(name: str, spec: Sequence, values: list, start: Any) -> ipywidgets.Widget:
    style = {"description_width": "initial"}
    shared = {"description": _words(name), "value": start, "style": style}
    if all(isinstance(v, bool) for v in values):
        return ipywidgets.Checkbox(**shared, indent=False, layout={"width": "auto"})
    if all(isinstance(v, str) for v in values):
        return ipywidgets.Dropdown(options=values, **shared)
    if isinstance(spec, tuple) and all(isinstance(v, int) for v in values):
        return ipywidgets.IntSlider(min=values[0], max=values[-1], continuous_update=False,
                                    step=spec[2] if len(spec) == 3 else 1, **shared)
    # Over labels, not values: the widget takes the value None for "nothing selected".
    shared["value"] = _label(start)
    return _SLIDER(options=list(map(_label, values)), continuous_update=False, **shared)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _label(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
