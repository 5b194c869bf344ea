"""The peak of this process's memory while a block runs, on Linux."""

import threading
from contextlib import suppress
from pathlib import Path


def memory_status() -> dict[str, int]:
    """Bytes from /proc/self/status: RssAnon, memory that was allocated and touched and that no
    file backs, and VmHWM, the peak of all that was resident, mapped files included."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(fields[key].split()[0]) for key in ("RssAnon", "VmHWM")}


class PeakMemory:
    """Watches the memory within its block: a thread reads RssAnon every 5 ms.

    before, peak: bytes of RssAnon when the block began, and the most that was seen; resident: the
    peak of all resident memory, since the block began where the system allows to count anew.
    """

    def __enter__(self):
        with suppress(OSError):  # not every container allows it
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
        self.before = self.peak = memory_status()["RssAnon"]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self._look()

    def _look(self) -> int:
        status = memory_status()
        self.peak = max(self.peak, status["RssAnon"])
        return status["VmHWM"]

    def __exit__(self, *error) -> None:
        self._over.set()
        self._thread.join()
        self.resident = self._look()
