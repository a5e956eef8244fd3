"""The demo model that the package ships."""

from importlib.resources import files
from pathlib import Path

DEMO = Path(str(files("expertgate"))) / "demo" / "model"
