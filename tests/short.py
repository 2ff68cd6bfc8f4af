"""`python tests/short.py SECONDS train.py DESCRIPTION`: the same program with a shorter training budget.

The budget is a constant of prepare.py; this wrapper changes it before train.py is loaded. The fingerprint differs from
that of a full run and no score of a short one can be mistaken for it.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare  # noqa: E402

prepare.TIME_BUDGET = prepare._CONSTANTS["TIME_BUDGET"] = float(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
