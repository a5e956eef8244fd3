import pytest

from tests.server.running import Server, running


@pytest.fixture(scope="session")
def server() -> Server:
    return running()
