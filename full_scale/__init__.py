"""Real checkpoints through the toy's model.py and losses.py.

Commands: load_hf.py, rollouts.py, train.py, evaluate.py. train.py is made of data.py, policy.py, reference.py, store.py, log.py
and processes.py. chunked.py can be copied alone. Nothing here imports the toy's train.py, and nothing draws.
"""

import sys
from importlib.util import find_spec

missing = [name for name in ("huggingface_hub", "jinja2", "math_verify", "tokenizers") if find_spec(name) is None]
if missing:
    print(f"full_scale: error: {', '.join(missing)} not installed: pip install -r full_scale/requirements.txt", file=sys.stderr)
    sys.exit(2)
