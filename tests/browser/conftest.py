"""JupyterLab and a browser, one of each for a worker's tests, kept apart from the user's own."""
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from course.kit import OUTPUTS_VARIABLE
from course.tools.execute import CELL_SECONDS, isolate_kernels
from course.tools.normal_form import NOTEBOOKS, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = ("no browser: install Chromium (Debian: apt-get install chromium) or Chrome, or run "
           ".venv/bin/playwright install chromium")
BROWSER_FLAGS = ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--no-first-run"]
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"windowingMode": "none"}}  # every cell is on the page
LAB_FLAGS = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0",
             "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class="
             "jupyterlab.handlers.announcements.NeverCheckForUpdate"]
IDLE = ("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status "
        "=== 'idle'")
# The code cells of these indexes, or all cells where there are none.
RUN = """indexes => {
    window.courseRan = ''
    window.jupyterapp.shell.collapseLeft()
    const notebook = window.jupyterapp.shell.currentWidget.content
    const code = notebook.widgets.filter(cell => cell.model.type === 'code')
    if (indexes) {
        notebook.deselectAll()
        notebook.activeCellIndex = notebook.widgets.indexOf(code[indexes[0]])
        indexes.forEach(index => notebook.select(code[index]))
    }
    window.jupyterapp.commands.execute(indexes ? 'notebook:run-cell' : 'notebook:run-all-cells')
        .then(() => window.courseRan = 'to its end', error => window.courseRan = String(error))
}"""


def pytest_addoption(parser):
    parser.addoption("--pictures", type=Path, metavar="FOLDER",
                     help="keep a picture of each notebook in JupyterLab, as NN_name.png")


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "said":
                terminalreporter.write_line(value)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """(address, token, folder) of a JupyterLab with copies of the notebooks in the folder; nothing
    is written elsewhere."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, home / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for plugin, value in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        write(path, json.dumps(value))
    isolate_kernels()
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "run",
           "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
           OUTPUTS_VARIABLE: "outputs"}
    environment = os.environ | {name: str(home / folder) for name, folder in own.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", *LAB_FLAGS, f"--ServerApp.port={port}",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'notebooks'}"]
    if _root():
        command.append("--allow-root")
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                  start_new_session=True)
    try:
        end = time.monotonic() + 180
        while not _answers(f"{address}/api/status?token={token}"):
            assert server.poll() is None and time.monotonic() < end, (home / "log").read_text()
            time.sleep(0.2)
        yield address, token, home / "notebooks"
    finally:
        server.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def _answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=2):
        return True
    return False


def _root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="session")
def browser():
    """Chromium or Chrome; a machine without one fails the tests and says what to install."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own)
        if not Path(found).exists():
            pytest.fail(MISSING)
        flags = BROWSER_FLAGS + ["--no-sandbox"] * _root()  # a root's browser cannot have one
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """An empty page; what it asks of the network stands in .asked, exceptions of scripts in .raised."""
    context = browser.new_context(viewport={"width": 1200, "height": 860})
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.asked, page.raised = [], []
    context.on("request", lambda request: page.asked.append(request.url))
    page.on("websocket", lambda socket: page.asked.append(socket.url))
    page.on("pageerror", lambda error: page.raised.append(str(error)))
    yield page
    context.close()


@pytest.fixture
def opened(lab, tab):
    """opened(name): the tab with that notebook open in JupyterLab. Its .run(indexes) runs these of
    the code cells, from top to bottom; all cells if none are given."""
    address, token, _ = lab

    def run(indexes=None):
        tab.evaluate(RUN, indexes)
        tab.wait_for_function("window.courseRan", timeout=2 * CELL_SECONDS * 1000, polling=250)
        assert tab.evaluate("window.courseRan") == "to its end"

    def open_(name):
        tab.goto(f"{address}/lab/tree/{name}?token={token}&reset")
        tab.wait_for_selector(".jp-NotebookPanel:visible .jp-Cell")
        tab.wait_for_function(IDLE)
        tab.run = run
        return tab

    yield open_
    tab.evaluate("window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()")


@pytest.fixture
def keep_picture(request):
    """keep_picture(page, name): with --pictures, what the page shows, in 64 colours."""
    folder = request.config.getoption("pictures", None)

    def keep(page, name):
        if folder:
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            folder.mkdir(parents=True, exist_ok=True)
            image.quantize(64, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)

    return keep
