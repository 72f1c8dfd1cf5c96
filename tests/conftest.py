import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"  # whoever runs the tests may be logged in
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process per core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # jobs of runs have several: waiting, they leave the cores free

import hypothesis
import pytest

hypothesis.settings.register_profile("cospadi", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("cospadi")


class TimeLeft:
    """A line every 30 seconds: tests done, tests in all, time left at this pace."""

    def __init__(self, config: pytest.Config):
        self.reporter = config.pluginmanager.get_plugin("terminalreporter")
        self.total = self.done = 0
        self.started = self.told = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = max(self.total, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.total = max(self.total, len(ids))

    def pytest_runtest_logfinish(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.told > 30 and self.total:
            self.told = now
            left = (now - self.started) / self.done * (self.total - self.done)
            line = f"{self.done} of {self.total} tests, {now - self.started:.0f} s, left about {left:.0f} s"
            self.reporter.ensure_newline()
            self.reporter.write_line(line)


@pytest.hookimpl(trylast=True)  # after the terminal reporter has come
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and config.pluginmanager.has_plugin("terminalreporter"):
        config.pluginmanager.register(TimeLeft(config), "time-left")
