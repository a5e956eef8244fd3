import pytest

from expertgate.server.errors import ApiError, invalid_credential


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_body_has_the_shape_that_clients_of_openai_read(status, kind):
    assert ApiError(status, "a_code", "what is wrong", "experts").body() == {
        "error": {"message": "what is wrong", "type": kind, "param": "experts", "code": "a_code"}
    }


def test_a_refused_credential_brings_the_challenge_that_http_asks_for():
    error = invalid_credential("no")
    assert (error.status, error.headers) == (401, {"WWW-Authenticate": "Bearer"})
