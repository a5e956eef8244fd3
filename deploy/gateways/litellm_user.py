"""A hook for LiteLLM's proxy: tells expertgate whose request it is. Lies beside litellm.yaml."""

from typing import Any

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger


class NameTheUser(CustomLogger):
    """Sends the owner of the virtual key, and the key's team as the group."""

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Raises HTTPException 403 for a key that is nobody's, or whose team can't be told."""
        user, group = user_api_key_dict.user_id, user_api_key_dict.team_alias
        if not user:
            raise HTTPException(403, "this key has no user_id, so policies can't tell who asks")
        for name in (user, group or ""):
            # A comma parts names in a header, and blanks at their ends are lost.
            if "," in name or name != name.strip():
                raise HTTPException(403, "this key's user or team would come to be another one")
        headers = {"X-Forwarded-User": user}
        if group:
            headers["X-Forwarded-Groups"] = group
        # Instead of what the client may have put there, or in what LiteLLM adds to it.
        data["extra_headers"] = headers
        for name in ("headers", "provider_specific_header"):
            data.pop(name, None)
        return data


name_the_user = NameTheUser()
