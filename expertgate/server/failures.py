"""Why a server that was set up rightly did not come up."""


class EngineError(RuntimeError):
    """The engine could not be started; one line that says why."""


class ProofError(RuntimeError):
    """An engine that must not serve; one line that says what it failed to show."""
