"""``snakemake --logger cospadi``: which jobs of a study run now, how far they are, and the time left.

Snakemake finds logger plug-ins by the name of their top-level package; what is shown is in `cospadi.pipeline.watch`.
"""

from __future__ import annotations

import logging

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from cospadi.pipeline.watch import Watch


class LogHandler(LogHandlerBase):
    """Hands Snakemake's events to a `Watch`; warnings and errors are printed as Snakemake words them."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.watch = Watch()

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if self.common_settings.dryrun:
            self.watch.say(self.format(record))
        elif hasattr(record, "expected"):
            self.watch.expect(record.expected, record.cores)
        elif event == LogEvent.RUN_INFO:
            self.watch.begin(record.stats)
        elif event == LogEvent.JOB_INFO:
            self.watch.start(record.jobid, record.rule_name, record.wildcards, record.log, record.threads)
        elif event == LogEvent.JOB_FINISHED:
            self.watch.finish(record.job_id)
        elif event == LogEvent.JOB_ERROR:
            self.watch.fail(record.jobid, record.rule_name, record.log)
        elif record.levelno >= logging.WARNING or str(record.msg).startswith("Nothing to be done"):
            self.watch.say(self.format(record))

    def close(self) -> None:
        self.watch.close()
        super().close()
