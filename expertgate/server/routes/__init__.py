"""The routes, one by one; what is not listed in `table.py` does not exist."""
