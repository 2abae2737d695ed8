"""Tests run offline, from any folder, on one thread each, and without drawing on a screen."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ["OMP_NUM_THREADS"] = "1"  # the tests' models are so small that a second thread only costs
