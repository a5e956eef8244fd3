"""Who may consult which expert. Pure Python and Cedar; knows no torch, vLLM or HTTP."""
