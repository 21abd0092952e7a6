"""``python -m conadv`` is ``conadv``."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    code = main()
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # threads of torch.distributed may still wait for ranks that are gone; Python's way out would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
