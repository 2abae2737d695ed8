"""Real checkpoints through the toy's model.py and losses.py.

Commands: load_hf.py, gym.py, rollouts.py, train.py, evaluate.py. train.py is made of data.py, policy.py, reference.py, exam.py,
store.py, log.py and processes.py; load_hf.py of published.py, prompts.py and gguf_file.py; formats.py and rows.py read data,
and verdict.py judges answers. chunked.py can be copied alone. sums.jsonl and differences.jsonl have worked examples. Nothing
here imports the toy's train.py, and nothing draws.
"""

import sys
from importlib.util import find_spec

needed = ("gguf", "huggingface_hub", "jinja2", "math_verify", "tokenizers", "transformers")
missing = [name for name in needed if find_spec(name) is None]
if missing:
    print(f"full_scale: error: {', '.join(missing)} not installed: pip install -r full_scale/requirements.txt", file=sys.stderr)
    sys.exit(2)
