"""Before a run: how long it takes, what it needs, and what an attack costs on given hardware.

``profile`` and ``measure`` hold and take measured points, ``cost_model`` turns them into the time
and the memory of a step, ``search`` picks executor and split. ``trial`` builds throw-away engines
and ``timing`` times them, for ``measure``, ``attack_cost``, ``micro_batch`` and ``dry_run``.
"""
