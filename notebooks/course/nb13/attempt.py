"""A test, written before the fault is mended, and what it says about a function."""
from collections.abc import Callable


def attempt(test: Callable[[Callable], None], function: Callable) -> bool:
    """Run the test on the function; print whether it passes, and return it."""
    name = test.__name__.removeprefix("test_").replace("_", " ")
    try:
        test(function)
    except Exception as error:
        said = str(error).partition("\n")[0]
        print(f"fails: {name}" + (f" ({said})" if said else ""))
        return False
    print(f"passes: {name}")
    return True
