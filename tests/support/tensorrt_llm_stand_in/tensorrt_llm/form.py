"""STAND-IN: which of its two forms it has in this process (see the package)."""

import os

OLD = {"1.2": True, "1.4": False}[os.environ.get("STAND_IN_VERSION", "1.2")]
