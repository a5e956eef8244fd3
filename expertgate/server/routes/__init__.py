"""The routes, one by one; what is not listed in `app.py` does not exist."""
