"""Real checkpoints through the toy's model.py and losses.py: load_hf.py, rollouts.py, train.py, evaluate.py."""

import sys
from importlib.util import find_spec

missing = [name for name in ("huggingface_hub", "jinja2", "math_verify", "tokenizers") if find_spec(name) is None]
if missing:
    print(f"full_scale: error: {', '.join(missing)} not installed: pip install -r full_scale/requirements.txt", file=sys.stderr)
    sys.exit(2)
