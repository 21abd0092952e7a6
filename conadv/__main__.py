"""``python -m conadv`` is ``conadv``."""

import os
import sys


def program() -> None:
    """The whole process: from the first import on, Ctrl-C ends it without a traceback."""
    try:
        from conadv.cli.program import main

        code = main()
    except KeyboardInterrupt:  # before main() could see to it
        sys.stderr.write("conadv: interrupted\n")
        code = 130
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # threads of torch.distributed may still wait for ranks that are gone; Python's way out
        # would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
