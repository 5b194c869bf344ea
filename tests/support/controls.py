"""What a unit test asks of a picture with controls; nbval draws all their settings together."""

import numpy as np
from matplotlib.figure import Figure

from course.kit.picture import render


def axes_of(draw, shape=(1, 1), **values):
    """The axes, one or an array of this shape, that `draw` has drawn on; nothing is rendered."""
    axes = Figure().subplots(*shape)
    draw(axes, **values)
    return axes


def _limits(axes):
    return [(ax.get_xlim(), ax.get_ylim()) for ax in np.ravel(axes)]


def check_controls(draw, controls, *, axes=(1, 1), rescaled_by=(), **data):
    """Asserts that each control changes the picture, and the limits of no axis, unless it is
    one of `rescaled_by`. Tried from the first value of all controls, one control at a time.

    controls: {name: its values}; data goes to `draw` as it is. Use with `quick_pictures`.
    """
    limits = {}

    def picture(**setting):
        def watched(panels, **values):
            draw(panels, **values)
            limits[tuple(setting.values())] = _limits(panels)
        return render(watched, [setting | data], size=(4, 3), axes=axes)

    start = {name: values[0] for name, values in controls.items()}
    first = picture(**start)
    fixed = limits.pop(tuple(start.values()))
    for name, (_, *values) in controls.items():
        settings = [start | {name: value} for value in values]
        assert any(picture(**s) != first for s in settings), f"{name} changes nothing"
        for setting in settings if name not in rescaled_by else ():
            found = limits.get(tuple(setting.values())) or _limits(axes_of(draw, axes, **setting,
                                                                           **data))
            assert found == fixed, f"{name} moves an axis"
