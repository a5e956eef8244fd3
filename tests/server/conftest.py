import pytest

from tests.server.running import Server, running


@pytest.fixture(scope="session")
def server() -> Server:
    return running()


@pytest.fixture(scope="module")
def issuer():
    from tests.support.issuer import Issuer

    issuer = Issuer()
    yield issuer
    issuer.stop()


@pytest.fixture(scope="module")
def coreless(tmp_path_factory, issuer):
    from tests.server.coreless import Coreless

    server = Coreless(tmp_path_factory.mktemp("coreless"), jwt=[issuer.config("corp")])
    yield server
    server.close()
