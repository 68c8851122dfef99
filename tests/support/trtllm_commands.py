"""Stand-ins for TensorRT-LLM's command lines."""

import sys
from pathlib import Path

STAND_IN = """#!{python}
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir(parents=True)
(out / "rank0.engine").write_text(json.dumps(sys.argv[1:]))
with open({log!r}, "a") as log: log.write(pathlib.Path(sys.argv[0]).name + "\\n")
sys.exit({code})
"""


def commands(tmp_path: Path, code: int) -> None:
    """Stand-ins that end with this code."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name in ("trtllm-build", "trtllm-refit"):
        path = tmp_path / "bin" / name
        path.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "log"), code=code))
        path.chmod(0o755)
