"""A hook for LiteLLM's proxy: tells expertgate whose request it is. Lies beside litellm.yaml."""

from typing import Any

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger


class NameTheUser(CustomLogger):
    """Sends the owner of the virtual key, and the key's team as the group."""

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Raises HTTPException 403 for a key that is nobody's."""
        if not user_api_key_dict.user_id:
            raise HTTPException(403, "this key has no user_id, so policies can't tell who asks")
        headers = {"X-Forwarded-User": user_api_key_dict.user_id}
        if user_api_key_dict.team_alias:
            headers["X-Forwarded-Groups"] = user_api_key_dict.team_alias
        # Instead of what the client may have put there, or in what LiteLLM adds to it.
        data["extra_headers"] = headers
        for name in ("headers", "provider_specific_header"):
            data.pop(name, None)
        return data


name_the_user = NameTheUser()
