import sys
from pathlib import Path

# The makers of cases are modules of their own.
sys.path.insert(0, str(Path(__file__).parent))
