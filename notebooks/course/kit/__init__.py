"""What the notebooks show: pictures, sliders, checks of exercises, recorded numbers.

    from course.kit import Recorder, SliderPlot, check, show

Names are looked up when first used, so that `python -m course.tools` does not
wait for matplotlib.
"""
from importlib import import_module

# Environment variables between the runner, pytest and the kernels that they start.
COMPARE_VARIABLE = "COURSE_COMPARE"   # 0: a run with other parameters, nothing is compared
BESIDE_VARIABLE = "COURSE_BESIDE"     # how many notebooks run beside this one
GRID_VARIABLE = "COURSE_GRID"         # 1: each SliderPlot draws its whole grid when it is made
OUTPUTS_VARIABLE = "COURSE_OUTPUTS"   # another folder than outputs/

_HOME = {
    "Recorder": "record",
    "SliderPlot": "slider",
    "LossPlot": "slider",
    "check": "exercise",
    "example": "exercise",
    "show": "picture",
    "matrix": "picture",
    "COLORS": "picture",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
