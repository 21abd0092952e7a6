"""Before the first step: what fits into memory, and what a run is going to be (``conadv train --dry-run``).

``rehearsal`` runs throw-away steps on synthetic images; ``memory`` says what is free and what they took; ``microbatch``
finds the largest micro-batch that fits; ``dryrun``, ``estimate`` and ``profiled`` gather what a run will need,
``picture`` and ``show`` show it. Nothing here changes what a run computes, but for the micro-batch that was asked for
as "auto".
"""
