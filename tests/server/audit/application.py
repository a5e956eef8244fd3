"""The real application, guard, grants and audit log, around an engine without a model."""

from types import SimpleNamespace

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.sampling_params import SamplingParams

from expertgate.model.catalogue import Catalogue
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.server.audit.trail import Trail
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.errors import invalid_credential
from expertgate.server.guard import GuardedLLM
from expertgate.server.handlers import Handlers
from expertgate.server.service import Service

EXPERTS = ("public", "math", "news")
CATALOGUE = Catalogue.model_validate(
    {
        "experts": [
            {"index": index, "name": name, "owner": f"{name}-owner", "sha256": f"{index}" * 64}
            for index, name in enumerate(EXPERTS)
        ]
    }
)
BODY = {"messages": [{"role": "user", "content": "a secret question"}]}


class EngineHandler:
    """Stands for vLLM's handlers: renders the request's id, and really calls the guarded engine."""

    def __init__(self):
        self.engine = None

    async def create_chat_completion(self, body):
        params = SamplingParams(extra_args=dict(body.vllm_xargs))
        prompt = {"type": "token", "prompt_token_ids": list(bytes.fromhex(body.request_id))}
        outputs = self.engine.generate(prompt, params, body.request_id)
        if body.stream:
            return self._stream(outputs)
        async for _ in outputs:
            pass
        return ChatCompletionResponse(model="toy", choices=[], usage=UsageInfo())

    create_completion = create_chat_completion

    async def _stream(self, outputs):
        chunk = '{"id":"chatcmpl-x","object":"o","created":1,"model":"toy","choices":'
        yield f'data: {chunk}[{{"delta":{{}},"finish_reason":null}}]}}\n\n'
        async for _ in outputs:
            yield f'data: {chunk}[{{"delta":{{}},"finish_reason":"stop"}}]}}\n\n'
        yield "data: [DONE]\n\n"


async def _identify(request):
    user = request.headers.get("user")
    if user is None:
        raise invalid_credential("who are you?")
    return Principal(user, frozenset({"research"}), via="key")


def service_of(audit_log, engine) -> Service:
    handler = EngineHandler()
    engine.slots = [0, 0, 2]  # of `news`, which every grant here has
    service = Service(
        catalogue=CATALOGUE,
        identity=SimpleNamespace(identify=_identify),
        policies=SimpleNamespace(
            version="v" * 64,
            decide=lambda principal, context: Decision(
                ExpertSet.of([0, 2]), {"public": ("all",), "news": ("readers",)}, "v" * 64
            ),
        ),
        audit=Trail(audit_log, CATALOGUE),
    )
    service.engine = handler.engine = GuardedLLM(engine, service.grants, CacheSalts(b"w"))
    service.handlers = Handlers(handler, handler, handler, handler, "toy", 2048, 0)
    return service
