"""What tests that run studies share."""

import pytest

from cospadi.pipeline import forks


@pytest.fixture(scope="module")
def one_server():
    """One process that has imported everything, for the jobs of all runs of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forks.ADDRESS, "")  # as it was, afterwards
        forks.start()
        yield
        server = forks._STARTED.pop()
        server.stdin.close()
        server.wait(timeout=60)
